"""The figures: drawn again, they are what lies in figures/, and they show the notebook's own numbers."""
import re
import shutil
import subprocess
import sys

import matplotlib
import pytest

from notebook_definitions import ROOT

NAMES = ["architecture", "row", "lookup", "offsets", "interactions"]


def labels(path):
    """The texts of an SVG that matplotlib wrote: with text as paths it keeps each one as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def drawn_again(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawing")
    for part in ("figures", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.svg", "__pycache__"))
    for name in ("DLRM.ipynb", "dlrm_utils.py"):
        shutil.copy(ROOT / name, folder)
    subprocess.run([sys.executable, "figures/make_figures.py"], cwd=folder, check=True)
    return folder / "figures"


@pytest.mark.parametrize("name", NAMES)
def test_drawn_again_it_is_the_same(drawn_again, name):
    stored, fresh = ROOT / f"figures/{name}.svg", drawn_again / f"{name}.svg"
    assert labels(stored) == labels(fresh) and len(labels(stored)) > 5
    if f"Matplotlib v{matplotlib.__version__}" in stored.read_text(encoding="utf-8"):
        assert stored.read_bytes() == fresh.read_bytes()


def test_the_architecture_shows_the_worked_numbers():
    text = " ".join(labels(ROOT / "figures/architecture.svg"))
    for number in ("0.80", "1.408", "1.60", "[0.69, 0.50]", "Zombie Picnic"):
        assert number in text


def test_the_computation_graph_shows_each_part():
    text = (ROOT / "figures/dlrm_graph.svg").read_text(encoding="utf-8")
    for part in ("EmbeddingBagBackward", "BmmBackward", "tables.0.weight", "bottom.0.weight", "top.2.bias"):
        assert part in text
