"""The notebook's own classes, functions and hand-typed example, for tests, figures and benchmarks.

Runs of DLRM.ipynb: every import, function and class, and whole the cells tagged `example`; nothing that trains or prints.
"""
import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                   # the notebook imports dlrm_utils from its own folder


def code_cells():
    """The notebook's code cells as dicts, in order."""
    notebook = json.loads((ROOT / "DLRM.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def load():
    """A namespace with everything that the notebook defines."""
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    namespace = {"__name__": "DLRM.ipynb"}
    for cell in code_cells():
        tree = ast.parse(source(cell))
        if "example" not in tags(cell):
            tree.body = [node for node in tree.body if isinstance(node, definitions)]
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, "DLRM.ipynb", "exec"), namespace)
    return SimpleNamespace(**namespace)
