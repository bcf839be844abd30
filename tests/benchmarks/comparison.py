"""The paper's comparison in full: five models, SGD and Adagrad, three seeds, one epoch each.

1,000,000 toy rows with the paper's layers (a number as argument gives another), and MovieLens with
small ones; the rates are those that `learning_rates.py` found. Seconds are those of one core.
Writes figures/measured/comparison_scores.csv, _curves.csv and _groups.csv. Some 40 minutes.
"""

import sys
import tempfile

import pandas as pd

from shared import (
    BATCH_SIZE,
    SEEDS,
    best_possible,
    best_rates,
    clicks_of,
    compare,
    in_parallel,
    save,
    table_of,
    toy_data,
    with_best_possible,
)


def one_run(data_set, layers, pair, seed):
    """The three DataFrames of `compare` for one pair of model and optimizer."""
    clicks = clicks_of(data_set)
    name = "MovieLens" if data_set == "MovieLens" else "toy"
    rates = best_rates(name, layers).loc[[pair]]
    batches = clicks.get_batch, clicks.rows, clicks.validation, clicks.test
    tables = compare(clicks.models(layers), rates, *batches, BATCH_SIZE, [seed])
    return [table.assign(data=name) for table in tables]


def main(rows=1_000_000):
    pairs = best_rates("toy", "paper").index
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_data(folder, rows)
        sets = [("MovieLens", "small"), (str(data.path), "paper")]
        jobs = [(*chosen, pair, seed) for chosen in sets for pair in pairs for seed in SEEDS]
        scores, curves, groups = map(pd.concat, zip(*in_parallel(one_run, jobs)))
        best = best_possible(data, truth)
    known = with_best_possible(scores[scores["data"] == "toy"], best)
    scores = pd.concat([scores[scores["data"] == "MovieLens"], known])
    groups = groups.rename_axis("group").reset_index()
    for name, table in (("scores", scores), ("curves", curves), ("groups", groups)):
        save(table.round(6), f"comparison_{name}", rows == 1_000_000)
    for data_set, part in scores.groupby("data"):
        for statistic in ("mean", "std"):
            print(data_set, statistic, table_of(part, statistic).round(4).to_string(), sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
