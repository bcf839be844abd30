"""What the benchmarks share: data, the five models, their comparison, timing in turns, results.

Most programs here take a number of rows, so that they can be tried at a tiny size. Only a run at
its own size writes to figures/measured, which the notebook draws; others to build/measured.
"""

import functools
import itertools
import multiprocessing
import os
import sys
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import dlrm_utils  # noqa: E402  (it lies in the folder that was just put on the path)
from data import toy_clicks  # noqa: E402
from data.movielens import fetch_movielens  # noqa: E402

notebook = dlrm_utils.load_notebook()
MEASURED = ROOT / "figures/measured"
BATCH_SIZE = 256
LAYERS = {"small": ([64], [64]), "paper": ([512, 256, 64], [512, 256])}  # bottom MLP, top MLP
MODELS = ["logistic regression", "factorization machine", "plain MLP", "DCN", "DLRM"]
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
    rows: range  # to train on
    validation: dlrm_utils.Batch
    test: dlrm_utils.Batch
    num_dense: int

    def models(self, layers):
        """By name, what makes a new model for these clicks."""
        made = five_models(16, *LAYERS[layers]).items()
        sizes = {"table_sizes": self.table_sizes, "num_dense": self.num_dense}
        return {name: functools.partial(new, **sizes) for name, new in made}


def toy_data(folder, rows, signal=True):
    """Toy clicks as (CriteoData, true probability of each row), in a folder of their own."""
    raw = Path(folder) / f"toy-{rows}-{signal}.txt"
    truth = toy_clicks.write_toy_criteo(raw, rows, signal=signal)
    return dlrm_utils.preprocess_criteo(raw, raw.with_suffix(""), min_count=10), truth


def best_possible(data, truth, rows=None):
    """The score of the true probabilities on the test rows, or on the given range of rows."""
    rows = rows or data.test
    return notebook.score(data.labels[rows.start : rows.stop], truth[rows.start : rows.stop])


def movielens():
    """MovieLens-100K as `Clicks`: oldest 80 % to train, next 10 % to choose by, newest to test."""
    ratings = fetch_movielens(ROOT / "data")
    ratings["click"] = (ratings["rating"] >= 4).astype(int)
    bounds = [0, int(0.8 * len(ratings)), int(0.9 * len(ratings)), len(ratings)]
    frames = [ratings[start:end] for start, end in itertools.pairwise(bounds)]
    encoder = dlrm_utils.FrameEncoder(
        dense=["age", "year"],
        categorical=["user_id", "item_id", "gender", "occupation"],
        multi_hot=["genres"],
        label="click",
    ).fit(frames[0])
    train, choose, test = map(encoder.transform, frames)
    return Clicks(encoder.table_sizes, train.take, range(len(train.dense)), choose, test, 2)


@functools.cache
def clicks_of(data_set):
    """`Clicks` of "MovieLens", or of a processed Criteo folder given by its path."""
    if data_set == "MovieLens":
        return movielens()
    data = dlrm_utils.load_criteo(data_set)
    validation, test = data.batch(data.validation[:20_000]), data.batch(data.test)
    return Clicks(data.table_sizes, data.batch, data.train, validation, test, 13)


# ---- The comparison --------------------------------------------------------------------------


def five_models(embedding_dim, bottom_mlp, top_mlp):
    """By name, what makes each model: a function of the table sizes and num_dense."""
    width = {"embedding_dim": embedding_dim}
    machine = functools.partial(notebook.FactorizationMachine, **width)
    plain = functools.partial(notebook.PlainMLP, **width, hidden=top_mlp)
    dcn = functools.partial(notebook.DCN, **width, cross_layers=6, deep=top_mlp)
    dlrm = functools.partial(notebook.DLRM, **width, bottom_mlp=bottom_mlp, top_mlp=top_mlp)
    new = (notebook.LogisticRegression, machine, plain, dcn, dlrm)
    return dict(zip(MODELS, new, strict=True))


def best_rates(data_set, layers):
    """The rate of the lowest validation log loss for each (model, optimizer), as searched."""
    tried = pd.read_csv(MEASURED / "learning_rates.csv")
    tried = tried[(tried["data"] == data_set) & (tried["layers"] == layers)]
    best = tried.loc[tried.groupby(["model", "optimizer"])["log_loss"].idxmin()]
    return best.set_index(["model", "optimizer"])["learning_rate"]


def learning_curve(model, optimizer, get_batch, rows, validation, batch_size, seed=0, points=8):
    """Train for one epoch; a DataFrame with `points` rows: rows seen, log loss and accuracy."""
    every, seen, curve = max(1, len(rows) // batch_size // points), [], []

    def after_step(step, logits, labels):
        seen.append((logits, labels))
        if (step + 1) % every:
            return
        logits, labels = map(torch.cat, zip(*seen))
        before_step = notebook.score(labels.cpu().numpy(), torch.sigmoid(logits).cpu().numpy())
        held_out = notebook.evaluate(model, validation)
        point = {"rows": (step + 1) * batch_size}
        for name, score in (("training", before_step), ("validation", held_out)):
            point[f"{name} log loss"] = score["log_loss"]
            point[f"{name} accuracy"] = score["accuracy"]
        curve.append(point)
        seen.clear()

    notebook.train(model, get_batch, rows, optimizer, batch_size, seed=seed, after_step=after_step)
    return pd.DataFrame(curve)


def calibration_groups(labels, probabilities, groups=10):
    """Mean prediction and share of clicks in equal groups of rising prediction, a DataFrame."""
    table = pd.DataFrame({"prediction": probabilities, "share": labels})
    table = table.sort_values("prediction", kind="stable")
    return table.groupby(np.arange(len(table)) * groups // len(table)).mean()


def compare(new_models, rates, get_batch, rows, validation, test, batch_size, seeds):
    """Each model, optimizer and seed, trained once for an epoch.

    rates: a Series of learning rates by (model, optimizer). Returns three DataFrames: scores on
    `test`, learning curves, and calibration groups.
    """
    scores, curves, groups = [], [], []
    for ((name, optimizer_name), rate), seed in itertools.product(rates.items(), seeds):
        run = {"model": name, "optimizer": optimizer_name, "seed": seed}
        torch.manual_seed(seed)
        model = new_models[name]()
        optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=rate)
        started = time.perf_counter()
        curve = learning_curve(model, optimizer, get_batch, rows, validation, batch_size, seed)
        seconds = time.perf_counter() - started
        labels, predictions = test.labels.numpy(), notebook.predict(model, test)
        calibration = calibration_groups(labels, predictions)
        error = (calibration["prediction"] - calibration["share"]).abs().mean()
        score = {"seconds": seconds, "calibration_error": error}
        score |= notebook.score(labels, predictions) | {"parameters": notebook.count(model)}
        scores.append(run | score)
        curves.append(curve.assign(**run))
        groups.append(calibration.assign(**run, seconds=seconds))
    return pd.DataFrame(scores), pd.concat(curves), pd.concat(groups)


def table_of(scores, statistic="mean"):
    """A row for each optimizer and model, best mean log loss first; `statistic` over the seeds."""
    columns = ["auc", "log_loss", "accuracy", "calibration_error", "parameters", "seconds"]
    runs = scores.groupby(["optimizer", "model"])
    order = runs["log_loss"].mean().reset_index().sort_values(["optimizer", "log_loss"])
    table = runs[columns].agg(statistic).astype({"parameters": int}, errors="ignore")
    return table.loc[pd.MultiIndex.from_frame(order[["optimizer", "model"]])]


def share_of_the_way(scores, best_log_loss):
    """How far each model goes from logistic regression's log loss to the best possible one.

    scores: with columns optimizer, seed, model and log_loss; Adagrad's rows are taken. Returns a
    DataFrame of shares, a row for each seed and a column for each model.
    """
    adagrad = scores[scores["optimizer"] == "Adagrad"]
    loss = adagrad.set_index(["seed", "model"])["log_loss"].unstack()
    additive = loss["logistic regression"]
    return loss.rsub(additive, axis=0).div(additive - best_log_loss, axis=0)


def with_best_possible(scores, best):
    """The scores, and beside them those of the true probabilities."""
    return scores.assign(
        **{f"truth_{name}": best[name] for name in ("auc", "log_loss", "accuracy")}
    )


# ---- Results ---------------------------------------------------------------------------------


def save(table, name, full_size):
    """Write a table for the notebook to draw; that of a smaller run goes to build/measured."""
    folder = MEASURED if full_size else ROOT / "build/measured"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    print(f"written: {(folder / name).relative_to(ROOT)}.csv")
