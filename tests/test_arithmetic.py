"""The program that measures the notebook's noise: what its settings change, and what it reports."""

import nbformat
import pytest

import arithmetic
from notebook_numbers import read_ranges

TRAINING = """import torch
torch.set_num_threads(1)
torch.manual_seed(0)
layer = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    layer(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
print(f"{torch.get_num_threads()} threads end at {layer.weight.sum().item():.12f}")"""


def cell(name, source, *tags, printed=()):
    """A code cell with an id, tags and what it printed."""
    made = nbformat.v4.new_code_cell(source, id=name, metadata={"tags": list(tags)})
    made.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in printed]
    return made


def notebook_of(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


@pytest.mark.slow  # four kernels
def test_the_settings_change_the_last_bits_and_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "KEPT", tmp_path)
    parameters = cell("set", "factor = 1", "parameters")
    use = cell("use", "print(factor)", "nbval-ignore-output")
    notebook = notebook_of(parameters, use, cell("train", TRAINING, "approximate"))
    names = ["as it is", "two threads", "weights moved by a last bit, 1", "changed"]
    settings = [(name, "") for name in names[:3]] + [("as it is", "factor = 2")]
    runs = arithmetic.run_all(notebook, names, settings, processes=2)
    texts = {name: arithmetic.text_of(run["train"].outputs).split() for name, run in runs.items()}
    assert [texts[name][0] for name in names] == ["1", "2", "1", "1"]
    usual, moved = (float(texts[name][-1]) for name in (names[0], names[2]))
    assert 0 < abs(usual - moved) < 1e-6  # a unit in the last place of a float32, or a few
    assert arithmetic.text_of(runs["changed"]["use"].outputs).strip() == "2"
    assert arithmetic.ranges_of(notebook.cells[2], runs)[1] == sorted([usual, moved])
    assert len(list(tmp_path.glob("*.ipynb"))) == 4


def runs_of(*texts, name="a", tags=("approximate",)):
    """Runs of a notebook of one cell, which printed these texts; and the notebook."""
    runs = {f"run {k}": {name: cell(name, "", printed=[text])} for k, text in enumerate(texts)}
    return notebook_of(cell(name, "", *tags)), runs


def test_the_range_spans_the_runs_with_the_usual_words():
    notebook, runs = runs_of("AUC 0.81, 3 rows", "AUC 0.79, 3 rows", "loss 0.1, 3 rows")
    assert arithmetic.ranges_of(notebook.cells[0], runs) == [[0.79, 0.81], [3, 3]]
    assert list(arithmetic.complaints(notebook, runs)) == ["a: other words, run 2"]


def test_cells_that_are_compared_to_the_letter_must_not_move():
    notebook, runs = runs_of("loss 0.5", "loss 0.6", tags=())
    assert list(arithmetic.complaints(notebook, runs)) == [
        "a: compared to the letter, and differs, run 1"
    ]
    notebook, runs = runs_of("3 ms", "4 ms", tags=["nbval-ignore-output"])
    assert list(arithmetic.complaints(notebook, runs)) == []


def test_an_error_is_named():
    notebook, runs = runs_of("1", "1")
    error = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
    runs["run 1"]["a"].outputs.append(error)
    assert list(arithmetic.complaints(notebook, runs)) == ["a: an error, run 1"]


def test_what_is_written_is_read(tmp_path):
    cells = {"a": {"source": "12345678", "ranges": [[0.5, 0.75], [3, 3]]}}
    arithmetic.write_ranges(cells, ["as it is"], tmp_path / "ranges.json")
    assert read_ranges(tmp_path / "ranges.json") == {"settings": ["as it is"], "cells": cells}


def test_the_cells_until_a_section():
    notebook = notebook_of(cell("s-8-1", ""), cell("s-9-1", ""), cell("s-9-2", ""), cell("z", ""))
    assert len(arithmetic.cells_until(notebook, "s-9")) == 3
    assert len(arithmetic.cells_until(notebook, "")) == 4
    with pytest.raises(SystemExit, match="'s-7'"):
        arithmetic.cells_until(notebook, "s-7")


def test_the_widest_numbers_are_counted_in_last_digits(capsys):
    notebook, runs = runs_of("AUC 0.812", "AUC 0.792")
    arithmetic.print_widest(notebook, runs)
    assert "20.0  a" in capsys.readouterr().out
