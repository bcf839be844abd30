"""Section 10 in full: five models, SGD and Adagrad, three seeds; 1,000,000 toy rows at the paper's sizes, and MovieLens.

Runs the notebook's own `compare` with the learning rates of `learning_rates.py`, and writes what it returns to
figures/measured/comparison_*.csv, from which the notebook draws. Seconds are those of one core.
"""
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions
from learning_rates import BATCH_SIZE, MEASURED, clicks_of, in_parallel

book = notebook_definitions.load()
SEEDS = range(3)


def one_run(data_set, layers, pair, seed):
    """The three DataFrames of `compare` for one pair of model and optimizer."""
    clicks = clicks_of(data_set)
    rates = book.best_rates("MovieLens" if data_set == "MovieLens" else "toy", layers)
    return book.compare(clicks.models(layers), rates.loc[[pair]], clicks.get_batch, clicks.rows, clicks.validation,
                        clicks.test, BATCH_SIZE, [seed])


def with_truth(scores, labels, probabilities):
    """The scores, and beside them those of the true probabilities."""
    truth = book.score(labels, probabilities)
    return scores.assign(truth_auc=truth["auc"], truth_log_loss=truth["log_loss"], truth_accuracy=truth["accuracy"])


def main(rows=1_000_000):
    with tempfile.TemporaryDirectory() as folder:
        toy = f"{folder}/toy.npz"
        truth = book.dlrm_utils.write_toy_criteo(f"{folder}/toy.txt", rows)
        data = book.dlrm_utils.preprocess_criteo(f"{folder}/toy.txt", toy, min_count=10)
        jobs = [(data_set, layers, pair, seed) for data_set, layers in [("MovieLens", "small"), (toy, "paper")]
                for pair in book.best_rates("toy", "paper").index for seed in SEEDS]
        results = in_parallel(one_run, jobs)
        test = slice(data.test.start, data.test.stop)
        tables = {}
        for name, parts in zip(["scores", "curves", "groups"], zip(*results)):
            parts = [part.assign(data="MovieLens" if job[0] == "MovieLens" else "toy") for part, job in zip(parts, jobs)]
            tables[name] = pd.concat(parts).rename_axis("group").reset_index() if name == "groups" else pd.concat(parts)
        tables["scores"] = with_truth(tables["scores"], data.labels[test], truth[test])
        tables["scores"].loc[tables["scores"]["data"] == "MovieLens", ["truth_auc", "truth_log_loss", "truth_accuracy"]] = None
    for name, table in tables.items():
        table.round(6).to_csv(MEASURED / f"comparison_{name}.csv", index=False)
    for data_set, scores in tables["scores"].groupby("data"):
        for statistic in ("mean", "std"):
            print(data_set, statistic, book.table_of(scores, statistic).round(4).to_string(), sep="\n")


if __name__ == "__main__":
    main()
