"""What to write where a count is missing: 0, as Facebook's code does, the mean, or 0 and a flag?

Toy clicks in which emptiness means something: a missing count counts as the mean of its column, and
adds an effect of its own. DLRM, 200,000 rows (a number as argument gives another), small layers,
Adagrad, three seeds, log loss on the test part. Under a minute.
"""

import sys
import tempfile
from unittest import mock

import numpy as np
import pandas as pd
import torch

from shared import BATCH_SIZE, LAYERS, SEEDS, best_possible, notebook, stacked, toy_clicks, toy_data

MISSING = toy_clicks.MISSING


class TruthOfEmptiness(toy_clicks.ToyTruth):
    """Each column's emptiness moves the log-odds by an amount of its own, 0.5 or so."""

    def logit(self, dense, ranks):
        missing = dense == MISSING
        own = np.random.default_rng(0).normal(0, 0.5, dense.shape[1])
        return super().logit(np.where(missing, np.expm1(self.mean), dense), ranks) + missing @ own


def ways(data):
    """By name, how many numbers an example has, and what makes them of a batch and its gaps."""
    read = data.batch(data.train).dense
    gaps = torch.from_numpy(data.dense[: data.train.stop] == MISSING)
    means = read.masked_fill(gaps, 0).sum(0) / (~gaps).sum(0)
    return {
        "0": (13, lambda dense, missing: dense),
        "the mean": (13, lambda dense, missing: torch.where(missing, means, dense)),
        "0 and a flag": (26, lambda dense, missing: torch.cat([dense, missing.float()], 1)),
    }


def log_loss(data, num_dense, fill, seed):
    """Of a model that was trained for an epoch, on the test part."""

    def get_batch(rows):
        batch = data.batch(rows)
        missing = torch.from_numpy(data.dense[np.asarray(rows)] == MISSING)
        return batch._replace(dense=fill(batch.dense, missing))

    torch.manual_seed(seed)
    model = stacked(notebook.DLRM(data.table_sizes, 16, *LAYERS["small"], num_dense=num_dense))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.04)
    notebook.train(model, get_batch, data.train, optimizer, BATCH_SIZE, seed=seed)
    return notebook.evaluate(model, get_batch(data.test))["log_loss"]


def main(rows=200_000):
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(toy_clicks, "ToyTruth", TruthOfEmptiness),
    ):
        data, truth = toy_data(folder, rows)
        best = best_possible(data, truth)["log_loss"]
        losses = {
            name: [log_loss(data, *way, seed) for seed in SEEDS] for name, way in ways(data).items()
        }
    print(f"best possible {best:.4f}")
    print(pd.DataFrame(losses).agg(["mean", "min", "max"]).T.round(4).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
