"""`load_notebook`: definitions and examples, and nothing else of a notebook."""

import json

import pytest

from dlrm_utils import load_notebook


def written(path, *cells):
    """A notebook of code cells, each (source, tags)."""
    cells = [
        {
            "cell_type": "code",
            "source": source.splitlines(keepends=True),
            "metadata": {"tags": tags},
        }
        for source, tags in cells
    ]
    text = {"cell_type": "markdown", "source": ["not python at all"], "metadata": {}}
    path.write_text(json.dumps({"cells": [text, *cells]}))
    return path


def test_definitions_and_examples_are_taken_and_nothing_else_runs(tmp_path):
    path = written(
        tmp_path / "book.ipynb",
        ("import math\nsize = 4\nraise SystemExit", []),
        ("def double(x):\n    return 2 * x * 3\nprint(double(1))\nassert False", []),
        ("class Point:\n    norm = math.hypot", ["note"]),
        ("row = [1, 2]\ntotal = double(sum(row))\nprint(total)", ["example"]),
    )
    book = load_notebook(path)
    assert book.double(2) == 12 and book.Point.norm(3, 4) == 5 and book.total == 18
    assert not hasattr(book, "size")


def test_nothing_is_printed(tmp_path, capsys):
    load_notebook(written(tmp_path / "book.ipynb", ("print('hello')", ["example"])))
    assert capsys.readouterr().out == ""


def test_an_absent_package_and_what_needs_it_are_left_out(tmp_path):
    absent = "import no_such_package\nfrom no_such_package.part import Base"
    needs = "class Child(Base):\n    pass\nclass Alone:\n    pass"
    book = load_notebook(written(tmp_path / "book.ipynb", (absent, []), (needs, [])))
    assert hasattr(book, "Alone") and not hasattr(book, "Child")
    assert not hasattr(book, "no_such_package")


def test_after_an_absent_package_other_mistakes_are_still_seen(tmp_path):
    absent, mistake = "import no_such_package", "class Typo(nn_Module):\n    pass"
    with pytest.raises(NameError, match="nn_Module"):
        load_notebook(written(tmp_path / "book.ipynb", (absent, []), (mistake, [])))


def test_what_needs_what_needs_an_absent_package_is_left_out(tmp_path):
    chain = "import no_such_package as gone\nclass A(gone.B):\n    pass\nclass C(A):\n    pass"
    book = load_notebook(written(tmp_path / "book.ipynb", (chain, []), ("def f():\n    1", [])))
    assert hasattr(book, "f") and not hasattr(book, "A") and not hasattr(book, "C")


def test_an_absent_package_within_a_function_of_an_example_is_not_hidden(tmp_path):
    cell = "def f():\n    import no_such_package\nvalue = f()"
    with pytest.raises(ModuleNotFoundError):
        load_notebook(written(tmp_path / "book.ipynb", (cell, ["example"])))


def test_magic_lines_are_skipped(tmp_path):
    cell = "%matplotlib inline\n!ls\ndef f(x):\n    return x\n\n%time f(1)"
    book = load_notebook(written(tmp_path / "book.ipynb", (cell, [])))
    assert book.f(3) == 3


def test_a_real_mistake_in_the_language_is_named(tmp_path):
    with pytest.raises(SyntaxError):
        load_notebook(written(tmp_path / "book.ipynb", ("def f(:", [])))


def test_constants_in_capitals_are_taken(tmp_path):
    cells = "SIZE = 3\nSIZES = [SIZE, 2 * SIZE]\nROWS = print('computed')\nX = small = 1\nd = {}"
    later = "d['A'] = SIZE\ndef f(x=SIZE, y=SIZES):\n    return x, y"
    book = load_notebook(written(tmp_path / "book.ipynb", (cells, []), (later, [])))
    assert book.f() == (3, [3, 6])
    assert not {"ROWS", "X", "small", "d"} & set(vars(book))


def test_a_mistake_in_the_notebook_is_not_hidden(tmp_path):
    with pytest.raises(NameError, match="forgotten"):
        load_notebook(written(tmp_path / "book.ipynb", ("class A(forgotten):\n    pass", [])))


def test_the_notebook_lies_beside_the_module(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(vars(load_notebook())) == set(vars(notebook))
    assert notebook.DLRM.__name__ == "DLRM"
