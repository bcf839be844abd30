"""The paper's comparison in full: SGD and Adagrad, one epoch each, several seeds of every network.

200,000 toy rows with section 11's layers, then 1,000,000 with the paper's (a number as argument
gives another size to both): plain MLP, DCN, DLRM, and DLRM as published, with a ReLU after the
bottom MLP's last layer. The rates are those that `learning_rates.py` found on the validation part;
the scores are of the test part. `dead_outputs` counts outputs of the bottom MLP, of 16, that are
the same for all test rows.
Writes figures/measured/comparison_scores.csv and comparison_curves.csv, a quarter of an hour, and
those of the million, comparison_million.csv, in an hour.
"""

import math
import sys
import tempfile

import pandas as pd

from shared import (
    NETWORKS,
    PUBLISHED,
    ROWS,
    best_possible,
    best_rates,
    clicks_of,
    dead_outputs,
    in_parallel,
    notebook,
    one_epoch,
    save,
    toy_data,
)

SEEDS_OF_NETWORKS = 10


def seeds_of(layers, name):
    """The seeds of a model in a race: three of those that hardly differ, and of the published form
    on the million, which is no rival."""
    few = name not in NETWORKS or (layers == "paper" and name == PUBLISHED)
    return range(3 if few else SEEDS_OF_NETWORKS)


def one_run(folder, layers, name, optimizer, rate, seed):
    """A row of scores on the test part, NaN if training ran away, and the learning curve."""
    clicks = clicks_of(folder)
    run = {"model": name, "optimizer": optimizer, "learning_rate": rate, "seed": seed}
    try:
        model, curve = one_epoch(clicks, layers, name, optimizer, rate, seed)
    except ValueError:  # scikit-learn's, of predictions that are not numbers: it ran away
        return run | {"log_loss": math.nan}, pd.DataFrame()
    score = notebook.evaluate(model, clicks.test)
    row = run | {measure: score[measure] for measure in ("auc", "log_loss", "accuracy")}
    if hasattr(model, "bottom"):
        row["dead_outputs"] = dead_outputs(model, clicks.test)
    return row, curve.assign(**run)


def race(layers, rows):
    """Every model, optimizer and seed on so many clicks: (scores, curves)."""
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_data(folder, rows)
        jobs = [
            (str(data.path), layers, *pair, rate, seed)
            for pair, rate in best_rates(layers).items()
            for seed in seeds_of(layers, pair[0])
        ]
        runs, curves = zip(*in_parallel(one_run, jobs))
        best = best_possible(data, truth)
    scores = pd.DataFrame(runs).assign(truth_auc=best["auc"], truth_log_loss=best["log_loss"])
    by_model = scores.groupby(["optimizer", "model"])["log_loss"]
    print(f"{rows:,} clicks, {layers} layers; best possible log loss {best['log_loss']:.4f}")
    print(by_model.agg(["size", "count", "mean", "std", "min", "max"]).round(4).to_string())
    return scores.round(6), pd.concat(curves).round(6)


def main(rows=None):
    scores, curves = race("small", rows or ROWS["small"])
    save(scores, "comparison_scores", rows is None)
    save(curves, "comparison_curves", rows is None)
    scores, _ = race("paper", rows or ROWS["paper"])
    save(scores, "comparison_million", rows is None)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
