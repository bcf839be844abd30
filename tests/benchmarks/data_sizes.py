"""Log loss against training rows, 20,000 to 2,000,000: the five models with Adagrad and small layers, one epoch, three seeds.

All sizes are first rows of one toy file, so that they share vocabularies and test rows. Writes figures/measured/data_sizes.csv.
"""
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions
from comparison import SEEDS, with_truth
from learning_rates import BATCH_SIZE, MEASURED, clicks_of, in_parallel

book = notebook_definitions.load()
SIZES = [2_000_000, 600_000, 200_000, 60_000, 20_000]                # the longest first: better for two cores


def one_run(data_set, size, pair, seed):
    """The scores of one model trained on the first `size` rows."""
    clicks = clicks_of(data_set)
    scores, _, _ = book.compare(clicks.models("small"), book.best_rates("toy", "small").loc[[pair]], clicks.get_batch, clicks.rows[:size],
                                clicks.validation.take(range(2_000)), clicks.test, BATCH_SIZE, [seed])
    return scores.assign(rows=size)


def main():
    with tempfile.TemporaryDirectory() as folder:
        toy = f"{folder}/toy.npz"
        truth = book.dlrm_utils.write_toy_criteo(f"{folder}/toy.txt", SIZES[0] * 7 // 6 + 7)
        data = book.dlrm_utils.preprocess_criteo(f"{folder}/toy.txt", toy, min_count=10)
        pairs = [pair for pair in book.best_rates("toy", "small").index if pair[1] == "Adagrad"]
        jobs = [(toy, size, pair, seed) for size in SIZES for pair in pairs for seed in SEEDS]
        results = in_parallel(one_run, jobs)
        test = slice(data.test.start, data.test.stop)
        table = with_truth(pd.concat(results), data.labels[test], truth[test]).assign(data="toy")
    columns = ["data", "rows", "model", "optimizer", "seed", "auc", "log_loss", "truth_auc", "truth_log_loss"]
    table[columns].sort_values(["rows", "model", "seed"]).round(6).to_csv(MEASURED / "data_sizes.csv", index=False)
    for size, scores in table.groupby("rows"):
        print(size, book.share_of_the_way(scores, scores["truth_log_loss"].iloc[0]).round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
