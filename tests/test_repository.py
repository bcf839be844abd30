"""The README, the requirements and the benchmarks' folder say what is there."""

import importlib
import re

import pytest

from budgets import ROOT

READMES = ["README.md", "data/README.md", "tests/benchmarks/README.md"]
BENCHMARKS = sorted(path.stem for path in (ROOT / "tests/benchmarks").glob("*.py"))


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 100 and not line.startswith(("|", "<img"))]


@pytest.mark.parametrize("name", READMES)
def test_links_and_pictures_lead_somewhere(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = re.findall(r'<img src="([^"]+)"', text)
    links += re.findall(r"\]\((?!http|#)([^)#]+)\)", text)
    for link in links:
        assert (path.parent / link).exists(), link
    for picture in re.findall(r"<img [^>]*>", text):
        assert re.search(r'alt="[^"]{20,}"', picture), picture


def test_the_readme_names_the_commands_of_the_makefile():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(targets) >= 7
    for target in targets:
        assert f"make {target}" in text, target


def test_requirements_are_pinned_with_a_reason():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            pinned = re.fullmatch(r"[\w-]+==[\w.]+( *;[^#]+)? +# .+", line)
            assert line.startswith("#") or pinned, f"{path.name}: {line}"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts_and_is_described(name):
    """That it can be imported: its names are still those of the notebook and the companion."""
    if name == "torchrec_ranks":
        pytest.importorskip("torchrec")  # there are builds for Linux only
    module = importlib.import_module(name)
    assert module.__doc__
    assert f"{name}.py" in (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    assert name == "shared" or callable(module.main)
