"""The comparison of stored and fresh numbers: what it lets pass, and what it has to catch."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch

from budgets import ROOT, code_cells, read_notebook
from notebook_numbers import RANGES as RANGES_FILE
from notebook_numbers import (
    difference,
    fingerprint,
    is_approximate,
    last_digit,
    read_ranges,
    text_of,
    trouble,
    words_and_numbers,
)

STORED = "seed 0: log loss 0.382, AUC 0.8534 on 28,571 rows (best possible 0.338), change -0.4 %\n"
RANGES = [[0, 0], [0.3810, 0.3830], [0.8531, 0.8536], [28571, 28571], [0.338, 0.338], [-0.5, -0.4]]


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.382", "0.386"),  # one and a half times the range beside it
        ("0.382", "0.3783"),
        ("0.8534", "0.8543"),
        ("28,571", "28,572"),  # the last digit
        ("28,571", "28571"),
        ("(best possible 0.338", "(best possible 0.339"),
        ("-0.4", "-0.6"),
        ("-0.4", "\u22120.4"),  # a typographic minus
        ("loss 0.382", "loss   0.382"),  # a column may become wider
        ("\n", ""),
    ],
)
def test_noise_and_the_last_digit_may_differ(old, new):
    assert old in STORED
    assert difference(STORED, STORED.replace(old, new), RANGES) is None


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("0.382", "0.387", "number 2: 0.382 is stored, 0.387 came out"),  # 5 % let it pass
        ("0.382", "0.377", "number 2"),
        ("0.382", "-0.382", "number 2"),
        ("0.382", "nan", "6 numbers are stored, 5 came out"),
        ("0.382", "inf", "6 numbers are stored, 5 came out"),
        ("0.8534", "0.8520", "number 3"),
        ("28,571", "28,573", "number 4"),
        ("28,571", "28,57", "came out"),
        ("0.338", "0.340", "number 5"),
        ("-0.4", "0.4", "number 6"),
        ("log loss", "loss", "after the number 0"),
        ("AUC", "accuracy", "after the number 0.382"),
        (" %", "", "after the number -0.4"),
        ("seed 0", "seed 4", "number 1"),
        (STORED, "", "6 numbers are stored, 0 came out"),
        ("\n", "\nand 7\n", "6 numbers are stored, 7 came out"),
        ("\n", "\nand more\n", "after the number -0.4"),
    ],
)
def test_a_wrong_number_or_word_is_caught(old, new, said):
    assert old in STORED
    assert said in difference(STORED, STORED.replace(old, new), RANGES)


def test_a_stored_number_that_was_never_measured_is_refused():
    """The table was made from other outputs: comparing with it would prove nothing."""
    other = STORED.replace("0.382", "0.393")
    assert "run python tests/benchmarks/arithmetic.py" in difference(other, other, RANGES)
    assert "5 were measured" in difference(STORED, STORED, RANGES[:-1])


@pytest.mark.parametrize(
    "number, unit",
    [("0.382", 0.001), ("28571", 1), ("-0.40", 0.01), ("5.", 1), ("3.05e-08", 1e-10), ("1e3", 1e3)],
)
def test_the_last_digit_of_a_printed_number(number, unit):
    assert last_digit(number) == pytest.approx(unit, rel=1e-12)


def test_numbers_are_told_from_names_and_dates():
    text = "C4 float32 x_2: [1., -2.5e-03, +3] 1,234,567.8 or 1, 234; 2014-05"
    words, numbers = words_and_numbers(text)
    assert numbers == ["1.", "-2.5e-03", "+3", "1234567.8", "1", "234", "2014", "05"]
    assert words[0] == "C4 float32 x_2: ["


def test_text_of_takes_prints_and_shown_values_and_nothing_else():
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "a 1\n"},
        {"output_type": "stream", "name": "stderr", "text": "warning 2\n"},
        {"output_type": "display_data", "data": {"image/png": "3"}},
        {"output_type": "execute_result", "data": {"text/plain": "4", "text/html": "<b>5</b>"}},
    ]
    assert text_of(outputs).split() == ["a", "1", "4"]


def cell_of(stored, tags, **metadata):
    """A cell that prints a loss of 0.382, with another stored output."""
    cell = nbformat.v4.new_code_cell("print('loss', 0.382)", execution_count=1)
    cell.metadata.update(tags=tags, **metadata)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=stored)]
    return cell


def measured(cell, *ranges, source=None):
    """What the table holds of a cell."""
    return {cell.id: {"source": source or fingerprint(cell), "ranges": ranges}}


def test_a_cell_that_is_unmeasured_or_was_edited_is_refused_with_the_command():
    cell = cell_of("loss 0.382\n", ["approximate"])
    assert trouble(cell, {"cells": measured(cell, [0.38, 0.39])}) is None
    for cells in ({}, measured(cell, [0.38, 0.39], source="0")):
        said = trouble(cell, {"cells": cells})
        assert cell.id in said and "run python tests/benchmarks/arithmetic.py" in said


@pytest.mark.slow  # a pytest of its own, and a kernel
def test_the_plugin_compares_what_nbval_ran(tmp_path):
    both = ["nbval-ignore-output", "approximate"]
    texts = ["loss 0.381\n", "loss 0.385\n", "gain 0.382\n"]
    cells = [cell_of(text, both) for text in texts]
    cells += [cell_of("loss 0.5\n", both[:1]), cell_of("loss 0.382\n", both)]
    cells.append(cell_of("loss 0.5\n", both, needs="no_such_package"))
    table = {}
    for cell, high in zip(cells, [0.381, 0.385, 0.382, 0.5]):
        table |= measured(cell, [high - 0.001, high])
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "some.ipynb")
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/notebook_numbers.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests/notebook_ranges.json").write_text(json.dumps({"cells": table}))
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "some.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    outcomes = re.findall(r"^(PASSED|FAILED) some.ipynb::Cell (\d)", result.stdout, re.MULTILINE)
    assert sorted((int(cell), outcome) for outcome, cell in outcomes) == [
        (0, "PASSED"),
        (1, "FAILED"),  # another number
        (2, "FAILED"),  # another word
        (3, "PASSED"),
        (4, "FAILED"),  # not measured
        (5, "PASSED"),  # not compared here
    ], result.stdout
    assert "number 1: 0.385 is stored, 0.382 came out" in result.stdout


# ---- The table -------------------------------------------------------------------------------


def approximate_cells():
    return [cell for cell in read_notebook().cells if is_approximate(cell)]


def test_every_approximate_cell_was_measured_as_it_stands():
    """`make execute` names the command when this fails."""
    found = read_ranges()
    assert [said for cell in approximate_cells() if (said := trouble(cell, found))] == []
    assert len(found["settings"]) >= 10  # a run may have been left out


def test_the_table_names_no_processor():
    assert not re.search("intel|amd|xeon|epyc|apple", RANGES_FILE.read_text(), re.IGNORECASE)


# ---- Faults that 5 % let pass ----------------------------------------------------------------

SCORES = "section-9-10"  # the small world's scores


def hour_frozen(model):
    model.tables[2].weight.requires_grad_(False)


def hour_never_told(model):
    def all_unknown(module, arguments):
        ids, offsets = arguments
        return torch.zeros_like(ids), offsets

    model.tables[2].register_forward_pre_hook(all_unknown)


def one_product_of_six(model):
    """The top MLP reads the dense vector and six products; only viewer · film is left."""
    kept = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0])
    model.top.register_forward_pre_hook(lambda module, arguments: (arguments[0] * kept,))


def printed_until(last, break_model):
    """What a cell prints if each DLRM made before it is broken."""
    names = {"__name__": "__main__"}
    for cell in code_cells(read_notebook()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell.source, cell.id, "exec"), names)
        if "class DLRM" in cell.source:
            whole = names["DLRM"].__init__

            def broken(self, *arguments, whole=whole, **more):
                whole(self, *arguments, **more)
                if len(self.tables[0].weight) > 100:  # not the hand-typed one
                    break_model(self)

            names["DLRM"].__init__ = broken
        if cell.id == last:
            return printed.getvalue()
    raise AssertionError(f"there is no cell {last}")


@pytest.mark.slow  # section 8's training
@pytest.mark.parametrize("fault", [hour_frozen, hour_never_told, one_product_of_six])
def test_a_planted_fault_is_noticed_by_the_scores(fault, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    threads = torch.get_num_threads()
    [cell] = [cell for cell in code_cells(read_notebook()) if cell.id == SCORES]
    measured_ranges = read_ranges()["cells"][SCORES]["ranges"]
    stored, fresh = text_of(cell.outputs), printed_until(SCORES, fault)
    torch.set_num_threads(threads)  # the notebook set it to one
    said = difference(stored, fresh, measured_ranges)
    assert said and "came out" in said
    old, new = (map(float, words_and_numbers(text)[1]) for text in (stored, fresh))
    for before, after in zip(old, new, strict=True):
        assert abs(before - after) <= 0.01 + 0.05 * abs(before)  # once this was enough
