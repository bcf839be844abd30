"""`load_notebook`: definitions and examples that can run, and nothing else of a notebook."""

import builtins
import dis
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dlrm_models import load_notebook

ROOT = Path(__file__).resolve().parents[1]


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


# ---- What it gives runs ----


def globals_of(code):
    """The names that a function's code takes from its module, by Python's own instructions."""
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from globals_of(inner)


def test_every_function_and_method_of_our_notebook_finds_its_globals(notebook):
    known, functions = vars(notebook).keys() | vars(builtins).keys(), []
    for value in vars(notebook).values():
        members = vars(value).values() if isinstance(value, type) else [value]
        functions += [f for f in members if getattr(f, "__module__", None) == "DLRM.ipynb"]
    # PyTorch wraps the `step` of an optimizer's class once a test has made one.
    codes = [inspect.unwrap(f).__code__ for f in functions if hasattr(f, "__code__")]
    assert len(codes) > 40
    assert {name for code in codes for name in globals_of(code)} <= known


def test_functions_that_use_a_variable_of_the_notebook_are_left_out_and_it_is_said(tmp_path):
    cell = (
        "size = 3\ndef direct():\n    return size\ndef through():\n    return direct()"
        "\nclass Holder:\n    def get(self):\n        return (lambda: size)()"
        "\nclass Child(Holder):\n    pass\ndef own(size=2):\n    return size"
    )
    book = load_notebook(written(tmp_path / "book.ipynb", (cell, [])))
    assert book.own() == 2 and set(vars(book)) & {"direct", "through", "Holder", "Child"} == set()
    with pytest.raises(AttributeError, match="direct cannot run here: it uses .* 'size'"):
        book.direct()
    with pytest.raises(AttributeError, match="through cannot run here"):
        book.through()
    with pytest.raises(AttributeError, match="defines no 'nowhere'"):
        book.nowhere  # noqa: B018


def test_a_function_may_use_what_is_defined_after_it(tmp_path):
    cells = ("def first():\n    return second()", []), ("def second():\n    return SIZE", [])
    book = load_notebook(written(tmp_path / "book.ipynb", *cells, ("SIZE = 4", [])))
    assert book.first() == 4


def test_a_name_that_a_later_cell_makes_a_variable_stays(tmp_path):
    cells = ("film = 3\nafter = film + 1", ["example"]), ("for film in anything:\n    film()", [])
    assert load_notebook(written(tmp_path / "book.ipynb", *cells)).after == 4


# ---- Only some names ----


def test_names_bring_what_they_need_and_no_other_import(tmp_path):
    cells = (
        "import math\nimport no_such_package_at_all as heavy\nSIDE = 2",
        "def area(x):\n    return math.pi * SIDE * x\nclass Base:\n    pass",
        "class Round(Base):\n    def size(self):\n        return area(1)",
        "def other():\n    heavy.f()",
    )
    book = load_notebook(written(tmp_path / "book.ipynb", *((c, []) for c in cells)), ["Round"])
    assert book.Round().size() == pytest.approx(6.2832, abs=1e-4)
    assert {"Round", "Base", "area", "math", "SIDE"} <= set(vars(book))
    assert not {"heavy", "other"} & set(vars(book))


@pytest.mark.slow  # a process of its own, with PyTorch
def test_one_class_of_our_notebook_needs_pytorch_alone():
    code = (
        "import sys, dlrm_models\nbefore = set(sys.modules)\n"
        "book = dlrm_models.load_notebook(names=['DLRM'])\n"
        "book.DLRM([3], 2, [2], [2])\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert not set(run.stdout.split()) & {
        "sklearn",
        "scipy",
        "matplotlib",
        "onnxscript",
        "networkx",
    }


@pytest.mark.slow  # a process of its own, with all imports
def test_in_a_script_nothing_is_warned_of_sparse_gradients():
    code = (
        "import dlrm_models, torch\nbook = dlrm_models.load_notebook(names=['DLRM'])\n"
        "table = torch.nn.EmbeddingBag(5, 2, mode='sum', sparse=True)\n"
        "table(torch.tensor([1, 1]), torch.tensor([0])).sum().backward()\n"
        "torch.optim.SGD(table.parameters(), 0.1).step()\n"
        "table.weight.grad.coalesce()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
