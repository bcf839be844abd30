"""The comparison of stored and fresh numbers: what it lets pass, and what it has to catch."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from budgets import ROOT
from notebook_numbers import difference, text_of, words_and_numbers

STORED = "seed 0: log loss 0.382, AUC 0.8534 on 28,571 rows (best possible 0.338), change -0.4 %\n"


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.382", "0.389"),  # the third digit
        ("0.382", "0.38217"),  # more digits
        ("28,571", "28,572"),
        ("28,571", "28571"),
        ("-0.4", "-0.41"),
        ("-0.4", "\u22120.4"),  # a typographic minus
        ("loss 0.382", "loss   0.382"),  # a column may become wider
        ("\n", ""),
    ],
)
def test_a_last_digit_may_differ(old, new):
    assert old in STORED
    assert difference(STORED, STORED.replace(old, new)) is None


@pytest.mark.parametrize(
    "old, new, said",
    [
        (
            "0.382",
            "0.693",
            "number 2: 0.382 is stored, 0.693 came out",
        ),  # a model that is untrained
        ("0.382", "3.82", "number 2"),
        ("0.382", "-0.382", "number 2"),
        ("0.382", "nan", "6 numbers are stored, 5 came out"),
        ("0.382", "inf", "6 numbers are stored, 5 came out"),
        ("0.8534", "0.5", "number 3"),
        ("28,571", "25,571", "number 4"),
        ("28,571", "28,57", "came out"),
        ("-0.4", "0.4", "number 6"),
        ("log loss", "loss", "after the number 0.0"),
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
    assert said in difference(STORED, STORED.replace(old, new))


def test_the_tolerance_can_be_another():
    assert difference("loss 0.50", "loss 0.56") is not None
    assert difference("loss 0.50", "loss 0.56", tolerance=0.2) is None
    assert difference("loss 0.50", "loss 0.62", tolerance=0.2) is not None
    assert difference("loss 0.50", "loss 0.52", tolerance=0) is not None


def test_numbers_are_told_from_names_and_dates():
    text = "C4 float32 x_2: [1., -2.5e-03, +3] 1,234,567.8 or 1, 234; 2014-05"
    words, numbers = words_and_numbers(text)
    assert numbers == [1.0, -0.0025, 3.0, 1234567.8, 1.0, 234.0, 2014.0, 5.0]
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


@pytest.mark.slow  # a pytest of its own, and a kernel
def test_the_plugin_compares_what_nbval_ran(tmp_path):
    both = ["nbval-ignore-output", "approximate"]
    cells = [
        cell_of("loss 0.379\n", both),
        cell_of("loss 0.5\n", both),
        cell_of("loss 0.5\n", both, tolerance=0.5),
        cell_of("gain 0.382\n", both),
        cell_of("loss 0.5\n", both[:1]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "some.ipynb")
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/notebook_numbers.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "some.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    outcomes = re.findall(r"^(PASSED|FAILED) some.ipynb::Cell (\d)", result.stdout, re.MULTILINE)
    assert sorted((int(cell), outcome) for outcome, cell in outcomes) == [
        (0, "PASSED"),
        (1, "FAILED"),
        (2, "PASSED"),
        (3, "FAILED"),
        (4, "PASSED"),
    ], result.stdout
    assert "number 1: 0.5 is stored, 0.382 came out" in result.stdout
