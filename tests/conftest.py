"""What several tests share."""

from pathlib import Path

import hypothesis
import pytest

import dlrm_models
import dlrm_utils
from data import toy_clicks

ROOT = Path(__file__).resolve().parents[1]

# No test asserts a time: on a busy machine one example can take longer than any bound.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def notebook():
    """The notebook's own classes, functions and hand-typed example."""
    return dlrm_models.load_notebook()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """60,000 toy clicks as CriteoData, for every test that needs some; not to be changed."""
    raw = tmp_path_factory.mktemp("shared") / "toy.txt"
    toy_clicks.write_toy_criteo(raw, 60_000)
    return dlrm_utils.preprocess_criteo(raw, raw.with_suffix(""), min_count=10, progress=False)
