"""Models that outlive their notebook: its classes, saved folders, and the command that scores.

python dlrm_models.py predict MODEL IN OUT
"""

import argparse
import ast
import builtins
import collections
import contextlib
import io
import json
import re
import secrets
import shutil
import symtable
import sys
import time
import types
from pathlib import Path

import torch

from data.files import file_hash, flush, progress, read_json, replacing, waiting_lock, write_json
from dlrm_utils import Batch, FrameEncoder

# ---- The notebook's own definitions --------------------------------------------------------------

IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (*IMPORTS, ast.FunctionDef, ast.ClassDef)
Statement = collections.namedtuple("Statement", ["tree", "example", "defined", "used"])


class Definitions(types.SimpleNamespace):
    """What a notebook defines; of a name that was left out it says why."""

    __slots__ = ["left_out"]

    def __getattr__(self, name):
        raise AttributeError(self.left_out.get(name, f"the notebook defines no {name!r}"))


def load_notebook(path="DLRM.ipynb", names=None):
    """A namespace of the notebook's imports, functions, classes, plain constants in capitals
    (`SIZE = 3`), and of the cells tagged `example`.

    path: a relative one starts at this file. names: only these and what they need, which spares
    the other imports. Nothing else of the notebook runs. Left out are what an absent package would
    define, and functions that use a variable of the notebook: AttributeError says which.
    """
    path = Path(__file__).resolve().parent / path
    torch.sparse.check_sparse_tensor_invariants.disable()  # or PyTorch warns of sparse gradients
    namespace, left_out, uses = {"__name__": path.name}, {}, {}
    for tree, example, defined, used in _needed(list(_statements(path)), names):
        if not (example or isinstance(tree, DEFINITIONS) or _is_constant(tree, used, namespace)):
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(ast.Module([tree], []), path.name, "exec"), namespace)
            uses |= dict.fromkeys(defined, used)
        except (ModuleNotFoundError, NameError) as error:
            if error.name not in left_out and not isinstance(tree, IMPORTS):
                raise
            left_out |= dict.fromkeys(defined, str(error))
    size = -1
    while size != len(namespace):  # what uses what cannot run cannot run
        size = len(namespace)
        for name in uses.keys() & namespace.keys():
            if lacking := uses[name] - namespace.keys() - vars(builtins).keys():
                left_out[name] = f"{name} cannot run here: it uses the notebook's {min(lacking)!r}"
                del namespace[name]
    found = Definitions(**namespace)
    found.left_out = left_out
    return found


def _statements(path):
    """The statements of all cells; lines as %time are none."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = re.sub("^[%!].*", "", "".join(cell["source"]), flags=re.MULTILINE)
        if cell["cell_type"] == "code":
            example = "example" in cell["metadata"].get("tags", [])
            for tree in ast.parse(source).body:
                yield Statement(tree, example, *_names_in(tree))


def _names_in(tree):
    """The names that a statement defines, and the global ones in it, by Python's own rules."""
    scopes, used = [symtable.symtable(ast.unparse(tree), "", "exec")], set()
    defined = {s.get_name() for s in scopes[0].get_symbols() if s.is_assigned() or s.is_imported()}
    for scope in scopes:  # the list grows: bodies of classes, of functions, and those within
        used |= {name.get_name() for name in scope.get_symbols() if name.is_global()}
        scopes += scope.get_children()
    return defined, used - defined


def _needed(statements, names):
    """Those statements, in their order, that define the names or what these need; None: all."""
    names, size = None if names is None else set(names), -1
    while names is not None and size != len(names):
        size = len(names)
        names = names.union(*(each.used for each in statements if each.defined & names))
    return [each for each in statements if names is None or each.defined & names]


def _is_constant(tree, used, known):
    """Is it NAME = something of literals and known names, all in capitals and none called?"""
    nodes = list(ast.walk(tree))
    plain = isinstance(tree, ast.Assign) and ast.Call not in map(type, nodes)
    capitals = all(node.id.isupper() for node in nodes if isinstance(node, ast.Name))
    return plain and capitals and used <= known.keys()


# ---- Saved models, and files that they score -----------------------------------------------------

# settings.json names the folder of all other parts: to replace this one file replaces the model.
MODEL_VERSION = "dlrm_models.save_model 3"
OURS = re.compile(r"settings\.json|parts-.*|\.settings\.json\..*|weights\.pt|encoder")


def save_model(folder, model_settings, model, encoder):
    """Write a folder that `load_model` opens anywhere; an older one stays until it is whole.

    model_settings: the class's name in the notebook and its arguments without table_sizes, as
    {"class": "DLRM", "embedding_dim": 16, "bottom_mlp": [64], "top_mlp": [64], "num_dense": 13}.
    encoder: a fitted `FrameEncoder`, or the `CriteoData` that the model was trained on.
    ValueError if the reopened copy does not score alike, or if the folder holds anything else.
    """
    folder, encoder = Path(folder), getattr(encoder, "encoder", encoder)
    _parts_in(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder / ".lock", f"it saves a model in {folder}"):
        older, parts = _parts_in(folder), folder / f"parts-{secrets.token_hex(4)}"
        try:
            parts.mkdir()
            encoder.save(parts / "encoder")
            torch.save(model.state_dict(), parts / "weights.pt")
            settings = {"model": model_settings | {"class": type(model).__name__}}
            hashes = {"encoder": encoder.fingerprint(), "weights": file_hash(parts / "weights.pt")}
            settings |= hashes | {"parts": parts.name}
            _check_scores(model, *_opened(parts, settings))
            for path in [*parts.rglob("*"), parts]:
                flush(path)
            write_json(folder / "settings.json", MODEL_VERSION, settings)
        except BaseException:
            shutil.rmtree(parts if older else folder, ignore_errors=True)
            raise
        for path in older:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parts_in(folder):
    """What savers have left in a folder but for its settings; ValueError if there is more."""
    found = [path for path in folder.glob("*") if path.name != ".lock"]
    for path in found:
        if not OURS.fullmatch(path.name):
            raise ValueError(f"{path} is not of save_model; name another folder for the model")
    return [path for path in found if path.name != "settings.json"]


def _check_scores(model, again, encoder):
    """ValueError if a model and its reopened copy differ on random rows, of two ids a bag."""
    draw, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    dense = 3 * torch.randn(64, len(encoder.numeric), generator=draw)
    ids = [torch.randint(size, (128,), generator=draw) for size in encoder.table_sizes]
    batch = Batch(dense, ids, [torch.arange(0, 128, 2)] * len(ids)).to(device)
    with torch.inference_mode():
        logits = [each(*batch[:3]) for each in (model, again.to(device))]
    if not torch.allclose(*logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError("these settings make another model, with other logits: is one missing?")


def load_model(folder):
    """Open what `save_model` wrote: (model, encoder), the model on the CPU and in `eval` mode.

    FileNotFoundError where there is no folder; ValueError if it is cut, foreign or outdated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    settings, before = None, {}
    while settings != before:  # else another process has just saved there
        before = settings
        try:
            settings = read_json(folder / "settings.json", MODEL_VERSION)
            return _opened(folder / settings["parts"], settings)
        except (OSError, ValueError) as error:
            problem = error
    raise ValueError(f"{folder} is no whole saved model: {problem}") from problem


def _opened(parts, settings):
    """The model and the encoder in a folder of parts, or an error."""
    encoder, arguments = FrameEncoder.load(parts / "encoder"), dict(settings["model"])
    found = {"encoder": encoder.fingerprint(), "weights": file_hash(parts / "weights.pt")}
    if any(settings[part] != fingerprint for part, fingerprint in found.items()):
        raise ValueError("a part is cut, or of another model")
    for table in encoder.tables:
        encoder.names(table)  # now: the next saver takes these files away
    name = arguments.pop("class")
    kind = getattr(load_notebook(names=[name]), name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):  # call nothing else
        raise ValueError(f"the notebook has no such model as {name!r}")
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn does not move the caller's seed
            model = kind(encoder.table_sizes, **arguments)
        model.load_state_dict(torch.load(parts / "weights.pt", mmap=True, weights_only=True))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the notebook has no such {name} as {arguments}: {error}") from error
    return model.eval(), encoder


def predict_file(model_folder, rows, out):
    """Write one probability a row of a file to `out`, batch by batch; returns the rows' number.

    rows: raw lines where the model's columns are Criteo's, or a .csv or .parquet with its columns.
    `out` is there when all rows are scored, and not before.
    """
    rows, out, scored = Path(rows), Path(out).resolve(), 0
    rows.stat()  # FileNotFoundError before anything is opened
    in_the_way = out.exists() and (not out.is_file() or out.samefile(rows))
    if in_the_way or Path(model_folder).resolve() in out.parents:
        raise ValueError(f"{out} is in the way; name another file for the probabilities")
    model, encoder = load_model(model_folder)
    with replacing(out) as temporary, open(temporary, "w", encoding="ascii") as file:
        batches = encoder.batches(rows, label="unread")
        for batch in progress(batches, desc=f"scoring {rows.name}", unit="batch"):
            with torch.inference_mode():
                probability = torch.sigmoid(model(*batch[:3])).tolist()
            file.writelines(f"{p:.9g}\n" for p in probability)
            scored += len(probability)
    return scored


def main(arguments=None):
    """The command `predict`; an error is one line, and the exit code not 0."""
    parser = argparse.ArgumentParser(description="Score a file of rows with a saved model")
    parser.add_argument("command", choices=["predict"])
    for name in ("MODEL", "IN", "OUT"):
        parser.add_argument(name)
    given, start = vars(parser.parse_args(arguments)), time.perf_counter()
    try:
        rows = predict_file(given["MODEL"], given["IN"], given["OUT"])
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_models.py predict: {error}")
    print(f"{rows:,} rows in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
