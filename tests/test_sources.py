"""The notebook on other data than shipped, without a network; and its exercises' solutions."""

import contextlib
import io
import re
import shutil

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from budgets import ROOT, opening_and_part_one, read_notebook, sections, tags
from data.toy_clicks import write_toy_criteo
from dlrm_utils import preprocess_criteo

# Before anything else runs: an import of ipywidgets fails, as on a machine that has none.
NO_WIDGETS = 'import sys\nsys.modules["ipywidgets"] = None'
WHERE_IT_ENDED = 'print("folder:", clicks.path.name, "rows:", len(clicks))'


def solutions():
    """The code of every folded solution, in order."""
    cells = [cell for cell in read_notebook()["cells"] if cell["cell_type"] == "markdown"]
    text = "\n".join(cell["source"] for cell in cells)
    folded = re.findall(r"<details>.*?</details>", text, flags=re.DOTALL)
    return [code for part in folded for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL)]


def changed_notebook(parameters, more_cells):
    """The notebook with parameters as papermill would set them, and with cells at its end."""
    notebook = read_notebook()
    place = next(k for k, cell in enumerate(notebook.cells) if "parameters" in tags(cell))
    settings = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    new_cell = nbformat.v4.new_code_cell
    notebook.cells.insert(place + 1, new_cell(settings))
    notebook.cells.insert(0, new_cell(NO_WIDGETS))
    notebook.cells += map(new_cell, more_cells)
    return notebook


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """All that the notebook prints on a raw Criteo file, without a network.

    The one execution besides nbval's: small, but whole. At its end stand the exercises' solutions.
    """
    folder = tmp_path_factory.mktemp("other")
    for program in (ROOT / "DLRM.ipynb", *ROOT.glob("*.py")):
        shutil.copy(program, folder)
    shutil.copytree(ROOT / "figures", folder / "figures")
    (folder / "data").mkdir()
    for program in (ROOT / "data").glob("*.py"):
        shutil.copy(program, folder / "data")
    write_toy_criteo(folder / "train.txt", 7_000, seed=5)
    parameters = {
        "data_generation": "dataset",
        "raw_data_file": "train.txt",
        "num_rows": 7_000,
        "batch_size": 500,
        "device": "cpu",
    }
    notebook = changed_notebook(parameters, [WHERE_IT_ENDED, *solutions()])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PIP_NO_INDEX", "1")
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}})
        client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return folder, "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow  # the whole notebook
def test_a_criteo_file_without_a_network(other_run):
    folder, text = other_run
    assert "folder: train.txt-min10 rows: 7000" in text
    assert "section 10 runs on made-up people" in text
    assert (folder / "train.txt-min10/source.json").exists()
    assert not (folder / "data/ml-100k").exists()


@pytest.mark.slow  # with the run above, at whose end they stand
def test_exercises_are_solved(other_run):
    """That they ran is shown by `other_run`; that they check something, here."""
    assert len(solutions()) >= 5
    assert all("assert" in solution for solution in solutions())


@pytest.mark.slow  # imports, and the plots of Part I
def test_part_one_runs_for_another_impression(monkeypatch):
    """Its first "try it": offer The Cellar in the morning, and run Part I again."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(ROOT)
    part_one = opening_and_part_one(sections(read_notebook()))
    code = "\n".join(cell["source"] for section in part_one for cell in section.cells)
    for name, shown, other in (
        ("film", "Zombie Picnic", "The Cellar"),
        ("hour", "evening", "morning"),
    ):
        typed = f'{name} = "{shown}"'
        assert code.count(typed) == 1
        code = code.replace(typed, f'{name} = "{other}"')
    namespace = {"__name__": "part one"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, namespace)
    assert namespace["film_id"] == 2 and namespace["probability"] < 0.5


@pytest.mark.slow  # a training
def test_a_file_without_a_signal_has_an_auc_of_one_half(notebook, tmp_path):
    """What `data_generation = "random"` shows: nothing is to be learned, and nothing is."""
    write_toy_criteo(tmp_path / "random.txt", 60_000, signal=False)
    data = preprocess_criteo(tmp_path / "random.txt", tmp_path / "random", min_count=10)
    torch.manual_seed(0)
    model = notebook.DLRM(data.table_sizes, 16, [64], [64])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.04)
    notebook.train(model, data.batch, data.train, optimizer, 512)
    fresh = data.batch(range(data.test.start, data.validation.stop))
    result = notebook.evaluate(model, fresh)
    # 8,572 rows, a quarter of them clicks: the AUC of chance has a deviation of 0.007.
    assert 0.475 < result["auc"] < 0.525
    assert result["log_loss"] > notebook.entropy_of(result["base_rate"]) - 0.002
