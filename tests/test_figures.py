"""The figures: drawn again they are what is stored, their numbers are right, no text is cut."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from budgets import code_cells, read_notebook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "figures"))
import make_figures  # noqa: E402

NAMES = [draw.__name__ for draw in make_figures.FIGURES]
# By hand, from the numbers that the notebook types.
WORKED = {
    "architecture": ["probability 0.80", "logit 1.408", "1.60", "[0.69, 0.50]", "Zombie Picnic"],
    "row": ["films", "watched", "trailers", "3", "Picnic", "ids 1, 2", "id 3", "evening"],
    "plane": ["Toy Party", "The Cellar", "Zombie Picnic", "comedy", "horror", "drama"],
    "lookup": ["Zombie Picnic  3", "row 3", "−0.4", "(4, 2)"],
    "offsets": ["comedy", "horror", "drama", "empty", "bag 2"],
    "bottom_mlp": ["1.386", "0.693", "0.5", "−1", "bias −1", "ReLU: −0.307 → 0", "no ReLU here"],
    "additive": ["0", "1", "0.5", "0.8", "−0.4"],
    "plane_sum": ["comedy + horror", "0.4", "1.6"],
    "interactions": ["1.19", "0.95", "1.60", "0.27", "0.50", "0.40"],
    "curves": ["1.408", "0.803", "0.219", "1.627"],
    "gradient": ["−0.157", "0", "&lt;unknown&gt;  0", "comedy  1", "horror  2", "drama  3"],
    "sizes": ["For each number in the MLPs, 1,135 in the tables", "540,201,232"],
    "funnel": ["millions", "retrieval", "hundreds", "ranking", "ten"],
    "step": ["[0.80, 0.80]", "[0.90, 0.92]", "0.103", "0.118", "what Mira likes"],
    "auc": ["8 of 9 pairs in the right order: AUC 0.89"],
    "beside": ["drawn evenly", "180", "12", "210", "liked: click", "drawn: no click"],
    "live_mira": ["1. Zombie Picnic 0.803", "2. The Cellar 0.537", "3. Toy Party 0.527", "evening"],
    "live_world": ["Train", "learning rate", "funny", "scary"],
    "live_people": ["Star Wars", "popularity", "10."],
    "split": ["train: 39,291,958", "3,274,330", "validation: 3,274,329"],
    "butterfly": [f"{sender}→{receiver}" for sender in range(4) for receiver in range(4)],
}


def labels(path):
    """The texts of an SVG by matplotlib: with text as paths it keeps each one as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example(notebook):
    return make_figures.worked_example(notebook)


@pytest.fixture(scope="module")
def drawn_again(notebook, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    make_figures.draw_all(notebook, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_drawn_again_it_is_the_same(drawn_again, name):
    stored, fresh = ROOT / f"figures/{name}.svg", drawn_again / f"{name}.svg"
    assert labels(stored) == labels(fresh), "the notebook has changed: run make_figures.py"
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    if f"matplotlib=={matplotlib.__version__}" in pinned:  # another one may draw a path otherwise
        assert stored.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_it_shows_the_worked_numbers(name):
    shown = labels(ROOT / f"figures/{name}.svg")
    assert [text for text in WORKED[name] if text not in shown] == []


@pytest.mark.parametrize("draw", make_figures.FIGURES)
def test_no_text_is_cut_or_covers_another(example, draw):
    figure = draw(example).figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent(renderer).padded(-1.5) for text in texts]
    width, height = figure.bbox.size
    for text, box in zip(texts, boxes, strict=True):
        assert box.x0 > 0 and box.x1 < width, f"cut at a side: {text}"
        assert box.y0 > 0 and box.y1 < height, f"cut above or below: {text}"
    for (one, box), (two, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(other), (one, two)


def test_the_notebook_shows_every_figure():
    text = (ROOT / "DLRM.ipynb").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"figures/{name}.svg" not in text] == []
    assert f"{make_figures.CRITEO_EXAMPLES:,}" in text


def test_the_computation_graph_shows_each_part(notebook, tmp_path):
    text = (ROOT / "figures/dlrm_graph.svg").read_text(encoding="utf-8")
    make_figures.draw_computation(notebook, tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_text(encoding="utf-8") == text
    for part in ("EmbeddingBagBackward", "BmmBackward", "tables.0.weight", "bottom.0.weight"):
        assert part in text


def test_what_the_drawings_repeat_is_what_the_notebook_says():
    code = "\n".join(cell["source"] for cell in code_cells(read_notebook()))
    assert f"# dense: {', '.join(make_figures.DENSE_MEANINGS)}\n" in code


@pytest.mark.slow  # a process of its own, with all imports
def test_importing_draws_and_reads_nothing(tmp_path):
    """Without a notebook beside it, the program can be imported."""
    for folder in ("figures", "data"):
        (tmp_path / folder).mkdir()
    rooms = [f"data/{path.name}" for path in (ROOT / "data").glob("*.py")]
    programs = ["figures/make_figures.py", "figures/shapes.py", "dlrm_models.py", "dlrm_utils.py"]
    for name in programs + rooms:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", "import make_figures"]
    done = subprocess.run(command, cwd=tmp_path / "figures", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.svg")) == []
