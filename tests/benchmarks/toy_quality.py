"""What the README promises of toy clicks: logistic regression, DLRM and the best possible score.

200,000 rows (a number as argument gives another), one epoch, Adagrad, small layers; three seeds,
ten of DLRM and of its published form. And the control: the same file without a signal, AUC and log
loss minus entropy. Writes figures/measured/toy_quality.csv. Some 5 minutes.
"""

import sys
import tempfile

import pandas as pd

from comparison import one_run
from shared import (
    PUBLISHED,
    SEEDS,
    best_possible,
    best_rates,
    in_parallel,
    notebook,
    save,
    toy_data,
)

RUNS_OF = {"logistic regression": SEEDS, "DLRM": range(10), PUBLISHED: range(10)}


def main(rows=200_000):
    rates = best_rates("small").xs("Adagrad", level="optimizer")
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_data(folder, rows)
        control, _ = toy_data(folder, rows, signal=False)
        best = best_possible(data, truth)
        entropy = notebook.entropy_of(control.labels[control.test.start : control.test.stop].mean())
        jobs = [
            (str(data.path), "small", name, "Adagrad", rates[name], seed)
            for name, seeds in RUNS_OF.items()
            for seed in seeds
        ]
        jobs += [(str(control.path), "small", "DLRM", "Adagrad", rates["DLRM"], s) for s in SEEDS]
        scores = pd.DataFrame([score for score, _ in in_parallel(one_run, jobs)])
    scores = scores.assign(signal=[True] * (len(jobs) - len(SEEDS)) + [False] * len(SEEDS))
    scores["best_possible"] = scores["signal"].map({True: best["log_loss"], False: entropy})
    save(scores.round(6), "toy_quality", rows == 200_000)
    print(f"best possible: AUC {best['auc']:.4f}, log loss {best['log_loss']:.4f}")
    scores["above"] = scores["log_loss"] - scores["best_possible"]
    columns = ["auc", "log_loss", "above", "dead_outputs"]
    by_model = scores.groupby(["signal", "model"])[columns]
    print(by_model.agg(["mean", "min", "max"]).round(4).T.to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
