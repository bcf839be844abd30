"""Milliseconds a batch: the exporter's own ONNX file, appendix A's, and PyTorch, in turns.

The film model (5 tables) and 26 tables of at most 100,000 rows; 1, 7, 1,000 and 10,000 rows; one
id a bag, and bags of 0 to 4 ids. One thread each, medians; the largest difference from PyTorch.

Then where the time goes, operator by operator, with 10,000 rows of one id a bag.

    python tests/benchmarks/export_speed.py [--largest ROWS]

Writes figures/measured/export_speed.csv and export_operators.csv, unless --largest stops before
10,000 rows. Three minutes.
"""

import argparse
import collections
import functools
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from shared import dlrm_utils, notebook, save

FILMS = [752, 1617, 3, 22, 20]  # people, films, genders, occupations, genres of MovieLens-100K
ADS = np.minimum(dlrm_utils.CRITEO_KAGGLE_TABLE_SIZES, 100_000).tolist()
MODELS = {"films": (FILMS, 2), "26 tables": (ADS, 13)}
SLOW = 0.2  # seconds: what takes longer is measured once


def drawn_batch(sizes, num_dense, rows, ragged):
    """A Batch of random ids, one a bag or 0 to 4."""
    rng = np.random.default_rng(rows)
    indices, offsets = [], []
    for size in sizes:
        lengths = torch.from_numpy(rng.integers(0, 5, rows) if ragged else np.ones(rows, int))
        offsets.append(dlrm_utils.lengths_to_offsets(lengths))
        indices.append(torch.from_numpy(rng.integers(0, size, int(lengths.sum()))))
    return dlrm_utils.Batch(torch.randn(rows, num_dense), indices, offsets)


def opened_files(model, batch, folder):
    """Name to function from a batch to logits."""
    notebook.export(model, batch, folder / "sums")
    with mock.patch("torch.onnx.export", functools.partial(_as_it_comes, torch.onnx.export)):
        notebook.export(model, batch, folder / "loop")
    ways = {"exporter": notebook.open_onnx(folder / "loop.onnx")}
    return ways | {"appendix A": notebook.open_onnx(folder / "sums.onnx"), "PyTorch": model}


def _as_it_comes(export, *inputs, custom_translation_table, **options):
    return export(*inputs, **options)


def milliseconds_in_turns(ways, inputs):
    """Name to (median of its calls, logits); the calls alternate with those of the others."""
    times, logits = {name: [] for name in ways}, {}
    for turn in range(22):
        for name, way in ways.items():
            if turn == 0 or times[name][0] < SLOW:
                started = time.perf_counter()
                logits[name] = way(*inputs)
                times[name].append(time.perf_counter() - started)
    return {name: (1000 * np.median(times[name]), logits[name]) for name in ways}


def measure(largest):
    """A row for each model, batch and way."""
    measured = []
    for name, (sizes, num_dense) in MODELS.items():
        torch.manual_seed(0)
        model = notebook.DLRM(sizes, 16, [16], [32], num_dense=num_dense)
        with tempfile.TemporaryDirectory() as folder:
            ways = opened_files(model, drawn_batch(sizes, num_dense, 5, True), Path(folder))
        for rows in (rows for rows in (1, 7, 1000, 10_000) if rows <= largest):
            for bags in ("one id", "0 to 4 ids"):
                inputs = drawn_batch(sizes, num_dense, rows, bags != "one id")[:3]
                found = milliseconds_in_turns(ways, inputs)
                for way, (ms, logits) in found.items():
                    case = {"model": name, "bags": bags, "rows": rows, "way": way, "ms": ms}
                    difference = (logits - found["PyTorch"][1]).abs().max().item()
                    measured.append(case | {"difference": difference})
                    print(*measured[-1].values(), flush=True)
    return pd.DataFrame(measured)


def by_operator(calls=20, rows=10_000):
    """Milliseconds a batch of each operator, in appendix A's file and in PyTorch."""
    found = []
    for name, (sizes, num_dense) in MODELS.items():
        model = notebook.DLRM(sizes, 16, [16], [32], num_dense=num_dense)
        inputs = drawn_batch(sizes, num_dense, rows, False)[:3]
        with tempfile.TemporaryDirectory() as folder:
            notebook.export(model, drawn_batch(sizes, num_dense, 5, True), f"{folder}/model")
            spent = {"appendix A": _in_onnxruntime(folder, inputs, calls)}
        with profile(activities=[ProfilerActivity.CPU]) as told:
            for _ in range(calls):
                model(*inputs)
        spent["PyTorch"] = {e.key: e.self_cpu_time_total for e in told.key_averages()}
        for way, operators in spent.items():
            for operator, microseconds in operators.items():
                ms = microseconds / calls / 1000
                found.append(dict(model=name, rows=rows, way=way, operator=operator, ms=ms))
    return pd.DataFrame(found).query("ms >= 0.1").round(2)


def _in_onnxruntime(folder, inputs, calls):
    """Microseconds of each operator over some calls, as onnxruntime's profiler counts them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = f"{folder}/profile"
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
    dense, indices, offsets = inputs
    names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (t.numpy() for t in (dense, *indices, *offsets)), strict=True))
    for _ in range(calls):
        session.run(None, feed)
    spent = collections.Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and "op_name" in event["args"]:
            spent[event["args"]["op_name"]] += event["dur"]
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=10_000, help="rows of the largest batch")
    largest = parser.parse_args().largest
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        table = measure(largest)
    keys = ["model", "bags", "rows"]
    print(table.pivot(index=keys, columns="way", values="ms").round(2).to_string())
    print(table.groupby("way")["difference"].max().to_string())
    table["ms"] = table["ms"].round(3)
    table["difference"] = table["difference"].map("{:.0e}".format)
    save(table, "export_speed", largest >= 10_000)
    with torch.no_grad():
        operators = by_operator(rows=largest)
    print(operators.to_string(index=False))
    save(operators, "export_operators", largest >= 10_000)


if __name__ == "__main__":
    main()
