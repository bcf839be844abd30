"""What the benchmarks share: data, the models and one epoch of each, results.

Most programs here take a number of rows, so that they can be tried at a tiny size. Only a run at
its own size writes to figures/measured, which the notebook draws; others to build/measured.
"""

import functools
import math
import multiprocessing
import os
import sys
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import dlrm_models  # noqa: E402  (it lies in the folder that was just put on the path)
import dlrm_utils  # noqa: E402
from data import toy_clicks  # noqa: E402

notebook = dlrm_models.load_notebook()
MEASURED = ROOT / "figures/measured"
BATCH_SIZE = 256
ROWS = {"small": 200_000, "paper": 1_000_000}  # toy clicks that models of these layers train on
LAYERS = {"small": ([64], [64]), "paper": ([512, 256, 64], [512, 256])}  # bottom MLP, top MLP
MODELS = ["logistic regression", "factorization machine", "plain MLP", "DCN", "DLRM"]
PUBLISHED = "DLRM, as published"  # with a ReLU after the bottom MLP's last layer
NETWORKS = ["plain MLP", "DCN", "DLRM", PUBLISHED]
SEEDS = range(3)
torch.sparse.check_sparse_tensor_invariants.disable()  # PyTorch warns unless it is said


# ---- The processor ---------------------------------------------------------------------------


@functools.cache
def has_bfloat16(device="cpu"):
    """Is a product of bfloat16 matrices faster? Where not, PyTorch only imitates it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    wide = torch.ones(1024, 1024)
    narrow = wide.bfloat16()
    seconds = [
        np.median(timeit.repeat(lambda m=matrix: m @ m, number=1, repeat=9))
        for matrix in (wide, narrow)
    ]
    return bool(seconds[1] < seconds[0])


def bfloat16_or_say_so(device="cpu"):
    """`has_bfloat16`; where there is none, prints what is used in its place."""
    if not has_bfloat16(device):
        print("This processor has no fast bfloat16: the MLPs compute in 32 bits in its place.")
    return has_bfloat16(device)


def in_parallel(function, jobs):
    """function(*job) for each job, in order; a process a core, and a core a process."""
    spawn = multiprocessing.get_context("spawn")  # a forked torch can hang
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        results = [pool.submit(function, *job) for job in jobs]
        shown = dlrm_utils.progress(results, desc="runs", unit="run")
        return [result.result() for result in shown]


# ---- The data --------------------------------------------------------------------------------


class Clicks(NamedTuple):
    """What a comparison needs of a data set."""

    table_sizes: list
    get_batch: Callable  # row numbers to a Batch
    train: range
    validation: dlrm_utils.Batch  # to choose learning rates by
    test: dlrm_utils.Batch


def toy_data(folder, rows, signal=True):
    """Toy clicks as (CriteoData, true probability of each row), in a folder of their own."""
    raw = Path(folder) / f"toy-{rows}-{signal}.txt"
    truth = toy_clicks.write_toy_criteo(raw, rows, signal=signal)
    return dlrm_utils.preprocess_criteo(raw, raw.with_suffix(""), min_count=10), truth


def best_possible(data, truth, rows=None):
    """The score of the true probabilities on the test rows, or on the given range of rows."""
    rows = rows or data.test
    return notebook.score(data.labels[rows.start : rows.stop], truth[rows.start : rows.stop])


@functools.cache
def clicks_of(folder):
    """`Clicks` of a processed Criteo folder, of whose validation part 20,000 rows."""
    data = dlrm_utils.load_criteo(folder)
    validation, test = data.batch(data.validation[:20_000]), data.batch(data.test)
    return Clicks(data.table_sizes, data.batch, data.train, validation, test)


# ---- The comparison --------------------------------------------------------------------------


def model_makers(embedding_dim, bottom_mlp, top_mlp):
    """By name, what makes each model: a function of the table sizes and num_dense."""
    width = {"embedding_dim": embedding_dim}
    dlrm = functools.partial(notebook.DLRM, **width, bottom_mlp=bottom_mlp, top_mlp=top_mlp)
    return {
        "logistic regression": notebook.LogisticRegression,
        "factorization machine": functools.partial(notebook.FactorizationMachine, **width),
        "plain MLP": functools.partial(notebook.PlainMLP, **width, hidden=top_mlp),
        "DCN": functools.partial(notebook.DCN, **width, cross_layers=6, deep=top_mlp),
        "DLRM": dlrm,
        PUBLISHED: functools.partial(dlrm, relu_after_bottom=True),
    }


def stacked(model):
    """The model with each set of tables as one tall table: the same numbers, sooner."""
    for part in list(model.modules()):
        if isinstance(getattr(part, "tables", None), notebook.EmbeddingTables):
            part.tables = notebook.StackedTables(part.tables)
    return model


def best_rates(layers):
    """The rate of the lowest validation log loss for each (model, optimizer), as searched."""
    tried = pd.read_csv(MEASURED / "learning_rates.csv")
    tried = tried[tried["layers"] == layers]
    best = tried.loc[tried.groupby(["model", "optimizer"])["log_loss"].idxmin()]
    return best.set_index(["model", "optimizer"])["learning_rate"]


def one_epoch(clicks, layers, name, optimizer, rate, seed=0, rows=None, points=8):
    """Train the model of that name on all training rows, or on `rows`; (model, its curve)."""
    torch.manual_seed(seed)
    model = stacked(model_makers(16, *LAYERS[layers])[name](clicks.table_sizes))
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    rows = rows or clicks.train
    curve = learning_curve(
        model, optimizer, clicks.get_batch, rows, clicks.validation, BATCH_SIZE, seed, points
    )
    return model, curve


def learning_curve(model, optimizer, get_batch, rows, validation, batch_size, seed=0, points=8):
    """Train for one epoch; a DataFrame with `points` rows: rows seen, and two log losses.

    One is of the training rows since the point before, each by the model that had not yet learned
    from it; the other of the validation rows.
    """
    steps = math.ceil(len(rows) / batch_size)
    stops = {round(steps * k / points) for k in range(1, points + 1)}
    seen, curve = [], []

    def after_step(step, logits, labels):
        seen.append((logits, labels))
        if step + 1 not in stops:
            return
        logits, labels = map(torch.cat, zip(*seen))
        training = binary_cross_entropy_with_logits(logits, labels).item()
        held_out = notebook.evaluate(model, validation)["log_loss"]
        curve.append((min((step + 1) * batch_size, len(rows)), training, held_out))
        seen.clear()

    notebook.train(model, get_batch, rows, optimizer, batch_size, seed=seed, after_step=after_step)
    return pd.DataFrame(curve, columns=["rows", "training log loss", "validation log loss"])


def dead_outputs(model, batch):
    """How many outputs of a DLRM's bottom MLP are the same for every row of the batch."""
    with torch.no_grad():
        outputs = model.bottom(batch.dense)  # (B, D)
    return int((outputs.amax(0) == outputs.amin(0)).sum())


# ---- Results ---------------------------------------------------------------------------------


def save(table, name, full_size):
    """Write a table for the notebook to draw; that of a smaller run goes to build/measured."""
    folder = MEASURED if full_size else ROOT / "build/measured"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    print(f"written: {(folder / name).relative_to(ROOT)}.csv")
