"""The whole notebook on other data than shipped: no signal, a Criteo file, no network; and its exercises' solutions."""
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebook_definitions import ROOT, code_cells, source, tags
from dlrm_utils import preprocess_criteo, write_toy_criteo


def solutions():
    """The code of every folded solution, in order."""
    notebook = json.loads((ROOT / "DLRM.ipynb").read_text(encoding="utf-8"))
    text = "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    folded = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", text, flags=re.DOTALL)
    return [re.search(r"```python\n(.*?)```", solution, flags=re.DOTALL)[1] for solution in folded]


def run_notebook(folder, parameters, more_cells=()):
    """Execute the notebook in a folder of its own, with parameters as papermill would set them; returns all its text output."""
    for name in ("DLRM.ipynb", "dlrm_utils.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "figures", Path(folder) / "figures")
    notebook = nbformat.read(Path(folder) / "DLRM.ipynb", as_version=4)
    place = next(k for k, cell in enumerate(notebook.cells) if "parameters" in tags(cell))
    settings = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(settings))
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in more_cells]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_exercises_are_solved(tmp_path):
    assert len(solutions()) == 15 and all("assert" in solution for solution in solutions())
    shutil.copytree(ROOT / "data/ml-100k", tmp_path / "data/ml-100k")
    run_notebook(tmp_path, dict(num_rows=20_000), solutions())


def test_part_one_runs_for_another_impression():
    """The first 'try it': offer The Cellar in the morning, and run Part I again."""
    cells = [source(cell) for cell in code_cells()]
    end = next(k for k, cell in enumerate(cells) if "raw_line = " in cell)
    text = "\n".join(cells[:end]).replace('film = "Zombie Picnic"', 'film = "The Cellar"').replace('hour = "evening"', 'hour = "morning"')
    namespace = {"__name__": "part one"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(text, namespace)
    assert namespace["film_id"] == 2 and namespace["probability"] < 0.5


def test_random_data_without_a_network(tmp_path, no_network):
    text = run_notebook(tmp_path, dict(data_generation="random", num_rows=14_000, embedding_dim=4, device="cpu"))
    assert "MovieLens-100K could not be fetched" in text


@pytest.mark.parametrize("given", ["raw", "processed"])
def test_a_criteo_file(tmp_path, no_network, given):
    write_toy_criteo(tmp_path / "train.txt", 14_000, seed=5)
    parameters = dict(data_generation="dataset")
    if given == "raw":
        parameters["raw_data_file"] = "train.txt"
    else:
        parameters["processed_data_file"] = "criteo.npz"
        preprocess_criteo(tmp_path / "train.txt", tmp_path / "criteo.npz", progress=False)
    run_notebook(tmp_path, parameters)
    assert (tmp_path / ("train.npz" if given == "raw" else "criteo.npz")).exists()
