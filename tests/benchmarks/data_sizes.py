"""Log loss against training rows: the five models with Adagrad and small layers, three seeds.

6,000 to 600,000 rows, one epoch each. All sizes are first rows of one toy file, so that they
share vocabularies and test rows. A number as argument gives another largest size, of which the
others are parts. Writes figures/measured/data_sizes.csv. Some 5 minutes.
"""

import sys
import tempfile

import pandas as pd

from shared import (
    MODELS,
    SEEDS,
    best_possible,
    best_rates,
    clicks_of,
    in_parallel,
    notebook,
    one_epoch,
    save,
    toy_data,
)


def one_run(folder, size, name, rate, seed):
    """A row of scores of one model, trained on the first `size` rows."""
    clicks = clicks_of(folder)
    rows = clicks.train[:size]
    model, _ = one_epoch(clicks, "small", name, "Adagrad", rate, seed, rows, points=1)
    score = notebook.evaluate(model, clicks.test)
    run = {"rows": size, "model": name, "seed": seed}
    return run | {"auc": score["auc"], "log_loss": score["log_loss"]}


def main(largest=600_000):
    rates = best_rates("small").xs("Adagrad", level="optimizer")[MODELS]
    sizes = [largest * part // 100 for part in (100, 30, 10, 3, 1)]  # the longest run first
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_data(folder, largest * 7 // 6 + 7)
        jobs = [
            (str(data.path), size, name, rate, seed)
            for size in sizes
            for name, rate in rates.items()
            for seed in SEEDS
        ]
        table = pd.DataFrame(in_parallel(one_run, jobs))
        best = best_possible(data, truth)
    table = table.assign(truth_auc=best["auc"], truth_log_loss=best["log_loss"])
    table = table.sort_values(["rows", "model", "seed"])
    save(table.round(6), "data_sizes", largest == 600_000)
    above = table.assign(above=table["log_loss"] - best["log_loss"])
    print(above.pivot_table("above", index="rows", columns="model").round(4).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
