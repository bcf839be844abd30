"""The notebook as it is used: any setting, twice, beside another run, on a small file of one's own.

The settings' own cells are executed as they stand, without a kernel. Whole runs go through
papermill on a notebook of Part I's definitions, the settings and section 11, whose model is small.
"""

import ast
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
import pytest
import torch

from budgets import ROOT, code_cells, read_notebook, tags
from data import settings as of_settings

# ---- Refusals --------------------------------------------------------------------------------


def settings_cells():
    """The cell of parameters, and the one behind it that checks them."""
    cells = code_cells(read_notebook())
    [place] = [k for k, cell in enumerate(cells) if "parameters" in tags(cell)]
    return cells[place : place + 2]


def checked(**settings):
    """The namespace after the two cells, with some settings replaced between them."""
    parameters, check = settings_cells()
    names = {"settings": of_settings, "torch": torch, "DLRM": None}
    exec(parameters.source, names)
    assert settings.keys() <= names.keys()
    names |= settings
    exec(check.source, names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a raw file and a processed folder, from which the cells run."""
    (tmp_path / "raw.txt").write_text("")
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)


REFUSED = [
    ("num_rows", 7, "1,000 or more"),
    ("num_rows", 500, "1,000 or more"),
    ("num_rows", 1e3, "whole numbers"),  # as papermill types 1e3
    ("num_rows", True, "whole numbers"),
    ("num_rows", "200000", "whole numbers"),
    ("num_epochs", 0, "1 or more"),
    ("batch_size", 0, "1 or more"),
    ("embedding_dim", 0, "1 or more"),
    ("embedding_dim", 2.5, "whole numbers"),
    ("seed", -1, "0 or more"),
    ("seed", 2**64, "whole numbers"),
    ("seed", None, "whole numbers"),
    ("learning_rate", 0, "above 0"),
    ("learning_rate", float("nan"), "above 0"),
    ("learning_rate", "0.1", "above 0"),
    ("device", "gpu", "'auto', 'cpu'"),
    ("device", None, "'auto', 'cpu'"),
    ("ratings_file", "none/such", "that exists"),
    ("raw_data_file", "none/such", "that exists"),
    ("raw_data_file", None, "that exists"),
    ("processed_folder", "none/such", "that exists"),
    ("processed_folder", 2024, "that exists"),  # as papermill types 2024
    ("data_generation", "real", "'synthetic' or 'random'"),
    ("data_generation", "dataset", "with raw_data_file or processed_folder"),
]


@pytest.mark.parametrize("name, value, allowed", REFUSED)
def test_what_cannot_be_is_refused_by_name_value_and_what_is_allowed(folder, name, value, allowed):
    with pytest.raises(ValueError) as refused:
        checked(**{name: value})
    said = str(refused.value)
    assert said.startswith(f"{name} is {value!r}; allowed: ") and allowed in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "name, value", [("raw_data_file", "raw.txt"), ("processed_folder", "made")]
)
def test_a_file_of_ones_own_with_toy_clicks_contradicts_itself(folder, name, value):
    with pytest.raises(ValueError, match="data_generation is 'synthetic'; allowed: 'dataset' with"):
        checked(**{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_refused_where_there_is_none(folder):
    with pytest.raises(ValueError, match="device is 'cuda'; allowed: .*where there is a GPU"):
        checked(device="cuda")
    assert checked(device="auto")["device"] == "cpu"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data_generation": "random", "num_rows": 1000, "embedding_dim": 1, "batch_size": 1},
        {"seed": 2**31 - 1, "num_epochs": 3, "learning_rate": 1, "device": "cpu"},
        {"data_generation": "dataset", "raw_data_file": "raw.txt"},
        {"data_generation": "dataset", "processed_folder": "made"},
        {"data_generation": "dataset", "raw_data_file": "raw.txt", "processed_folder": "new"},
    ],
)
def test_what_can_be_passes_and_names_the_run(folder, settings):
    names = checked(**settings)
    assert names["run_name"] == checked(**settings)["run_name"]
    assert names["run_name"] != checked(**settings | {"seed": 3})["run_name"]


def test_every_setting_is_in_the_name_of_the_run(folder):
    """Two runs that differ in anything must not save into one folder."""
    parameters, _ = settings_cells()
    names = [node.targets[0].id for node in ast.parse(parameters.source).body]
    others = {"data_generation": "random", "ratings_file": "made", "learning_rate": 0.5}
    others |= {"device": None, "raw_data_file": None, "processed_folder": None}
    usual = checked()["run_name"]
    for name in names:
        other = others.get(name, 1234)
        if other is not None:
            assert checked(**{name: other})["run_name"] != usual, name


def test_part_two_alone_says_what_to_run_first(folder):
    names = {"settings": of_settings, "torch": torch}
    for cell in settings_cells()[:1]:
        exec(cell.source, names)
    with pytest.raises(RuntimeError, match="Part I.*Run All Above"):
        exec(settings_cells()[1].source, names)


def test_where_nothing_can_be_written_says_what_to_do(folder):
    Path("build").write_text("")  # root may write anywhere, but not into a file
    with pytest.raises(OSError, match="copy this folder"):
        checked()


# ---- Whole runs ------------------------------------------------------------------------------

WHOLE = ("opening", "section-8-parameters", "section-8-check", "section-11")
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def shortened(path, more=()):
    """Write a notebook of Part I's and II's definitions, the settings, and section 11.

    more: how the ids of cells begin that follow, such as D's; its ratings are left out.
    """
    kept = []
    for cell in code_cells(read_notebook()):
        cell.outputs = []
        if not cell.id.startswith((*WHOLE, *more)) or "ratings[" in cell.source:
            known = cell.id.startswith(("section", "appendix-c") if more else "section")
            statements = ast.parse(cell.source).body if known else []
            chosen = [one for one in statements if isinstance(one, DEFINITIONS)]
            cell.source = "\n".join(map(ast.unparse, chosen))
        if cell.source:
            kept.append(cell)
    nbformat.write(nbformat.v4.new_notebook(cells=kept, metadata=read_notebook().metadata), path)


def new_checkout(place):
    """A folder with what those cells need, and two shortened notebooks."""
    for name in (*(path.name for path in ROOT.glob("*.py")), "figures", "DLRM.ipynb"):
        (place / name).symlink_to(ROOT / name)
    (place / "data").mkdir()
    for path in (ROOT / "data").glob("*.py"):
        (place / "data" / path.name).symlink_to(path)
    shortened(place / "short.ipynb")
    shortened(place / "long.ipynb", more=["appendix-d"])
    return place


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """One for all runs, one after the other."""
    return new_checkout(tmp_path_factory.mktemp("checkout"))


def run(checkout, name="short", **settings):
    """Run one of the notebooks there by papermill; {cell id: what it printed}."""
    small = {"num_rows": 3000, "embedding_dim": 2} | settings
    done = papermill.execute_notebook(
        checkout / f"{name}.ipynb", None, small, cwd=checkout, progress_bar=False
    )
    printed = {}
    for cell in done.cells:
        if "injected-parameters" not in tags(cell):
            outputs = [o.text for o in cell.outputs if o.get("name") == "stdout"]
            printed[cell.id] = "".join(outputs)
    return printed


def log_losses(printed):
    """{whose: log loss} of section 11's table."""
    rows = [line.rsplit(maxsplit=4) for line in printed["section-11-14"].splitlines()[1:]]
    return {name.strip(): float(loss) for name, _, loss, *_ in rows}


def write_rows(path, rows, seed=0):
    """Lines of Criteo's shape that no program of this project wrote: names of many and of few,
    counts with long tails, empty fields, and a click that two of the columns decide."""
    coin = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(rows):
            places = [int(coin.paretovariate(0.5 + k % 5 / 4)) % 10**6 for k in range(26)]
            names = [f"{place * 2654435761 % 2**32:08x}" for place in places]
            names = [name if coin.random() > k / 60 else "" for k, name in enumerate(names)]
            counts = [int(coin.lognormvariate(1, 2)) - (k == 1) for k in range(13)]
            counts = [str(n) if coin.random() > k / 20 else "" for k, n in enumerate(counts)]
            clicked = coin.random() < (0.6 if places[2] % 3 == places[3] % 3 else 0.15)
            file.write("\t".join([str(int(clicked)), *counts, *names]) + "\n")


@pytest.mark.slow  # five kernels, each with a process that scores
def test_other_settings_after_the_first_just_run(checkout):
    """Another seed, no signal, other widths: in one checkout, one after the other."""
    first = run(checkout)
    other = run(checkout, seed=1)
    narrow = run(checkout, embedding_dim=1, batch_size=7, num_epochs=2, num_rows=1000)
    coins = run(checkout, data_generation="random")
    again = run(checkout)
    assert again == first != other
    for printed in (first, other, narrow, coins):
        assert log_losses(printed).keys() == {"base rate", "DLRM", "best possible"}
    assert log_losses(coins)["base rate"] == pytest.approx(log_losses(coins)["best possible"], 0.05)


@pytest.mark.slow  # two kernels at once, then one
def test_two_runs_at_once_end_as_one_alone(checkout, tmp_path):
    """In a new checkout, where both have to make the same file and the same folder."""
    shared = new_checkout(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda seed: run(shared, seed=seed), (2, 2))
    assert one == two == run(checkout, seed=2)


@pytest.mark.slow  # three kernels
def test_a_small_file_of_ones_own(checkout):
    """500 lines, and 8,000: what they can't show is said, the rest is true of them."""
    write_rows(checkout / "own500.txt", 500)
    write_rows(checkout / "own8000.txt", 8000)
    own = {"data_generation": "dataset", "num_rows": 200_000, "batch_size": 64}
    few = run(checkout, "long", raw_data_file="own500.txt", **own)
    assert "own500.txt-min10" in few["section-11-05"]  # said before it is written
    assert log_losses(few).keys() == {"base rate", "DLRM"}  # nobody knows the best possible
    assert few["appendix-d-10"] == "7 steps are too few for a long run\n"
    assert few["appendix-d-10b"] == ""
    many = run(checkout, "long", raw_data_file="own8000.txt", **own)
    assert log_losses(many)["DLRM"] < log_losses(many)["base rate"]
    assert "52 of 108 steps later: the same weights" in many["appendix-d-10"]
    assert "entropy" in many["appendix-d-10b"]
    # The folder that this made, opened without the text, gives the same.
    opened = run(checkout, processed_folder="own8000.txt-min10", **own)
    assert opened["section-11-14"] == many["section-11-14"]
