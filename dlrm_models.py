"""Models that outlive their notebook: its classes, saved folders, and the command that scores.

    python dlrm_models.py predict MODEL IN OUT

`load_notebook` reads what DLRM.ipynb defines, `save_model` and `load_model` keep a trained model
together with the encoder that turns raw rows into its input.
"""

import argparse
import ast
import builtins
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
from typing import NamedTuple

import torch

from data.files import file_hash, flush, progress, read_json, replacing, waiting_lock, write_json
from dlrm_utils import Batch, FrameEncoder, lengths_to_offsets

# ---- The notebook's own definitions --------------------------------------------------------------

IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (*IMPORTS, ast.FunctionDef, ast.ClassDef)


class Definitions(types.SimpleNamespace):
    """What a notebook defines; of a name that was left out it says why."""

    __slots__ = ("left_out",)

    def __getattr__(self, name):
        raise AttributeError(self.left_out.get(name, f"the notebook defines no {name!r}"))


class Statement(NamedTuple):
    """One statement of a notebook, with the names that it defines and uses."""

    tree: ast.stmt
    example: bool
    defined: frozenset
    used: frozenset  # at once, when it runs
    later: frozenset  # within the bodies of functions, when those are called


def load_notebook(path="DLRM.ipynb", names=None):
    """A namespace of the notebook's imports, functions, classes, plain constants in capitals
    (`SIZE = 3`), and of the cells tagged `example`.

    path: a relative one starts at this file. names: only these, and what they need, which spares
    the other imports. Nothing else of the notebook runs. Left out are what an absent package would
    define, and functions that use a variable of the notebook: AttributeError says which.
    """
    path = Path(__file__).resolve().parent / path
    statements = list(_statements(path))
    if names is not None:
        statements = _needed(statements, set(names))
    namespace, absent = {"__name__": path.name}, set()
    for statement in statements:
        definition = statement.example or isinstance(statement.tree, DEFINITIONS)
        if not (definition or _is_constant(statement, namespace.keys())):
            continue
        code = compile(ast.Module([statement.tree], []), path.name, "exec")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
        except (ModuleNotFoundError, NameError) as error:
            if error.name not in absent and not isinstance(statement.tree, IMPORTS):
                raise
            absent |= statement.defined
    left_out = _without_what_cannot_run(namespace, statements)
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
    """(defined, used, later) of a statement, by Python's own rules for whose a name is."""
    table = symtable.symtable(ast.unparse(tree), "", "exec")
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    return frozenset(defined), frozenset(used), frozenset(_globals_within(table))


def _globals_within(table):
    for inner in table.get_children():
        yield from (s.get_name() for s in inner.get_symbols() if s.is_global())
        yield from _globals_within(inner)


def _needed(statements, names):
    """Those statements, in their order, that define the names or what these need in turn."""
    size = -1
    while size != len(names):
        size = len(names)
        for statement in statements:
            if statement.defined & names:
                names |= statement.used | statement.later
    return [statement for statement in statements if statement.defined & names]


def _is_constant(statement, known):
    """Is it NAME = something of literals and known names, all in capitals and none called?"""
    capitals = all(map(str.isupper, statement.defined | statement.used))
    calls = any(isinstance(node, ast.Call) for node in ast.walk(statement.tree))
    plain = isinstance(statement.tree, ast.Assign) and not calls
    return plain and bool(statement.defined) and capitals and statement.used <= known


def _without_what_cannot_run(namespace, statements):
    """Take functions and classes with an absent global out of a namespace; {name: why}."""
    later = {name: statement.later for statement in statements for name in statement.defined}
    known, left_out, size = set(vars(builtins)), {}, -1
    while size != len(namespace):
        size = len(namespace)
        for name in later.keys() & namespace.keys():
            if lacking := sorted(later[name] - namespace.keys() - known):
                left_out[name] = f"{name} cannot run here: it uses the notebook's {lacking[0]!r}"
                del namespace[name]
    return left_out


# ---- Saved models --------------------------------------------------------------------------------

# settings.json names the folder of the other parts: replacing this one file replaces all at once.
MODEL_VERSION = "dlrm_models.save_model 3"
PARTS = "parts-"
OTHERS = {"settings.json", ".lock", "weights.pt", "encoder"}  # the last two are of version 2


def save_model(folder, model_settings, model, encoder):
    """Write a folder that `load_model` opens anywhere; an older one stays until it is whole.

    model_settings: the class's name in the notebook and its arguments without table_sizes, as
    {"class": "DLRM", "embedding_dim": 16, "bottom_mlp": [64], "top_mlp": [64], "num_dense": 13}.
    encoder: a fitted `FrameEncoder`, or the `CriteoData` that the model was trained on.
    ValueError if the reopened model does not score as this one does, for example because a
    setting is absent, or if the folder holds anything else. It needs memory for a second model.
    """
    folder, encoder = Path(folder), getattr(encoder, "encoder", encoder)
    new = not folder.exists()
    for path in () if new else folder.iterdir():
        if not (path.name in OTHERS or path.name.startswith((PARTS, ".settings.json."))):
            raise ValueError(f"{path} is not of save_model; name another folder for the model")
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder / ".lock", f"it saves a model in {folder}"):
        parts = folder / f"{PARTS}{secrets.token_hex(4)}"
        try:
            parts.mkdir()
            encoder.save(parts / "encoder")
            torch.save(model.state_dict(), parts / "weights.pt")
            settings = {"model": model_settings | {"class": type(model).__name__}}
            settings |= {"parts": parts.name, "encoder": encoder.fingerprint()}
            settings |= {"weights": file_hash(parts / "weights.pt")}
            _check_scores(model, *_opened(folder, settings))
            for path in [*parts.rglob("*"), parts]:
                flush(path)
            write_json(folder / "settings.json", MODEL_VERSION, settings)
        except BaseException:
            shutil.rmtree(parts if not new else folder, ignore_errors=True)
            raise
        _remove_all_but(folder, parts)


def _remove_all_but(folder, parts):
    """Remove what older versions and killed processes left."""
    for path in folder.iterdir():
        if path.is_dir() and path != parts:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (parts.name, "settings.json", ".lock"):
            path.unlink(missing_ok=True)


def _check_scores(model, again, encoder):
    """ValueError if a model and its reopened copy differ on random rows."""
    device = next(model.parameters()).device
    draw, lengths = torch.Generator().manual_seed(0), []
    for name in encoder.tables:
        most = 4 if name in encoder.multi_hot else 2
        lengths.append(torch.randint(most == 2, most, (64,), generator=draw))
    ids = [
        torch.randint(size, (int(counts.sum()),), generator=draw)
        for size, counts in zip(encoder.table_sizes, lengths, strict=True)
    ]
    dense = 3 * torch.randn(64, len(encoder.numeric), generator=draw)
    batch = Batch(dense, ids, [lengths_to_offsets(counts) for counts in lengths]).to(device)
    training = model.training
    with torch.inference_mode():
        logits = [each.eval()(*batch[:3]) for each in (model, again.to(device))]
    model.train(training)
    if not torch.allclose(*logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            "these settings make another model: a few rows' logits differ by up to "
            f"{(logits[0] - logits[1]).abs().max():.2g}; name all that the model was made with"
        )


def load_model(folder):
    """Open what `save_model` wrote: (model, encoder), the model on the CPU and in `eval` mode.

    FileNotFoundError where there is no folder; ValueError if it is cut, foreign, of another
    version, or of parts that do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    settings = None
    while True:
        before = settings
        try:
            settings = read_json(folder / "settings.json", MODEL_VERSION)
            return _opened(folder, settings)
        except FileNotFoundError as error:
            if settings == before:  # else another process has just saved there
                raise ValueError(f"{folder} is not a whole saved model: {error}") from error


def _opened(folder, settings):
    """The model and the encoder of a folder with these settings."""
    parts = folder / settings["parts"]
    encoder = FrameEncoder.load(parts / "encoder")
    found = {"encoder": encoder.fingerprint(), "weights": file_hash(parts / "weights.pt")}
    for name, fingerprint in found.items():
        if settings[name] != fingerprint:
            raise ValueError(f"the saved model in {folder} is cut, or its {name} is another's")
    return _built(settings["model"], encoder.table_sizes, parts / "weights.pt").eval(), encoder


def _built(settings, table_sizes, weights):
    """The notebook's model of these settings with these weights, or ValueError."""
    arguments = {name: value for name, value in settings.items() if name != "class"}
    with torch.random.fork_rng(devices=[]):  # what is drawn does not move the caller's seed
        kind = getattr(load_notebook(names=[settings["class"]]), settings["class"], None)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):  # call nothing else
            raise ValueError(f"the notebook has no such model as {settings['class']!r}")
        try:
            model = kind(table_sizes, **arguments)
            state = torch.load(weights, map_location="cpu", mmap=True, weights_only=True)
            model.load_state_dict(state)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"the notebook has no such model as {settings}: {error}") from error
    return model


# ---- Scoring a file ------------------------------------------------------------------------------


def predict_file(model_folder, rows, out):
    """Write one probability a row of a file to `out`, batch by batch; returns the rows' number.

    rows: raw lines where the model's columns are Criteo's, or a .csv or .parquet with its columns;
    a label is not needed. `out` is there when all rows are scored, and not before.
    """
    rows, out, scored = Path(rows), Path(out).resolve(), 0
    rows.stat()  # FileNotFoundError before anything is opened
    if out.exists() and (not out.is_file() or out.samefile(rows)):
        raise ValueError(f"{out} is in the way; name another file for the probabilities")
    model, encoder = load_model(model_folder)
    with replacing(out) as temporary, open(temporary, "w", encoding="ascii") as file:
        batches = encoder.batches(rows, label=False)
        for batch in progress(batches, desc=f"scoring {rows.name}", unit="batch"):
            with torch.inference_mode():
                probability = torch.sigmoid(model(*batch[:3])).tolist()
            file.writelines(f"{p:.9g}\n" for p in probability)
            scored += len(probability)
    return scored


def main(arguments=None):
    """The command `predict`; an error is one line, and the exit code not 0."""
    parser = argparse.ArgumentParser(description="Score a file of rows with a saved model")
    command = parser.add_subparsers(dest="command", required=True).add_parser("predict")
    command.add_argument("model", metavar="MODEL", help="a folder that save_model wrote")
    command.add_argument("rows", metavar="IN", help="raw lines, .csv or .parquet")
    command.add_argument("out", metavar="OUT", help="gets one probability a row")
    given, start = parser.parse_args(arguments), time.perf_counter()
    try:
        rows = predict_file(given.model, given.rows, given.out)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_models.py predict: {error}")
    seconds = time.perf_counter() - start
    print(f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s")


if __name__ == "__main__":
    main()
