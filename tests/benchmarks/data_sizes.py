"""Log loss against training rows: the five models with Adagrad and small layers, three seeds.

20,000 to 2,000,000 rows, one epoch each. All sizes are first rows of one toy file, so that they
share vocabularies and test rows. A number as argument gives another largest size, of which the
others are parts. Writes figures/measured/data_sizes.csv. Some 25 minutes.
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
    share_of_the_way,
    toy_data,
    with_best_possible,
)


def one_run(data_set, size, pair, seed):
    """The scores of one model trained on the first `size` rows."""
    clicks = clicks_of(data_set)
    rates = best_rates("toy", "small").loc[[pair]]
    curve_on = clicks.validation.take(range(min(2_000, len(clicks.validation.labels))))
    batches = clicks.get_batch, clicks.rows[:size], curve_on, clicks.test
    scores, _, _ = compare(clicks.models("small"), rates, *batches, BATCH_SIZE, [seed])
    return scores.assign(rows=size, data="toy")


def main(largest=2_000_000):
    sizes = [largest * part // 100 for part in (100, 30, 10, 3, 1)]  # the longest run first
    pairs = [pair for pair in best_rates("toy", "small").index if pair[1] == "Adagrad"]
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_data(folder, largest * 7 // 6 + 7)
        path = str(data.path)
        jobs = [(path, size, pair, seed) for size in sizes for pair in pairs for seed in SEEDS]
        results = pd.concat(in_parallel(one_run, jobs))
        table = with_best_possible(results, best_possible(data, truth))
    kept = ["data", "rows", "model", "optimizer", "seed", "auc", "log_loss"]
    kept += ["truth_auc", "truth_log_loss"]
    table = table[kept].sort_values(["rows", "model", "seed"])
    save(table.round(6), "data_sizes", largest == 2_000_000)
    for size, scores in table.groupby("rows"):
        shares = share_of_the_way(scores, scores["truth_log_loss"].iloc[0])
        print(f"{size:,} rows", shares.round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
