"""The learning rates of the comparison: four for each of five models and two optimizers.

One epoch each, the same budget for all; log loss on validation rows. Toy clicks (200,000 rows with
small layers; 1,000,000 with the paper's, because the best rate changes with the number of rows) and
MovieLens (small layers). Two numbers as arguments give other rows. Some 40 minutes.
"""

import sys
import tempfile

import pandas as pd
import torch

from shared import BATCH_SIZE, MODELS, clicks_of, in_parallel, notebook, save, toy_data

FIVE_RATES = {
    ("toy", "SGD"): [
        [0.03, 0.1, 0.3, 1],
        [0.01, 0.03, 0.1, 0.3],
        [0.1, 0.3, 1, 3],
        [0.01, 0.03, 0.1, 0.3],
        [0.1, 0.3, 1, 3],
    ],
    ("toy", "Adagrad"): [[0.01, 0.02, 0.04, 0.08]] * 5,
    ("MovieLens", "SGD"): [
        [0.3, 1, 3, 10],
        [0.03, 0.1, 0.3, 1],
        [0.3, 1, 3, 10],
        [0.03, 0.1, 0.3, 1],
        [0.3, 1, 3, 10],
    ],
    ("MovieLens", "Adagrad"): [[0.04, 0.08, 0.16, 0.32]] + [[0.01, 0.02, 0.04, 0.08]] * 4,
}


def searches(data):
    """(optimizer, model, rate) of every run on one kind of data."""
    for (name, optimizer), rates_of in FIVE_RATES.items():
        if name == data:
            for model, rates in zip(MODELS, rates_of, strict=True):
                yield from [(optimizer, model, rate) for rate in rates]


def validation_loss(data_set, layers, optimizer, name, rate):
    """After one epoch; infinite if training ran away."""
    torch.manual_seed(0)
    clicks = clicks_of(data_set)
    model = clicks.models(layers)[name]()
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    notebook.train(model, clicks.get_batch, clicks.rows, optimizer, BATCH_SIZE)
    if not all(torch.isfinite(weights).all() for weights in model.parameters()):
        return float("inf")
    return round(notebook.evaluate(model, clicks.validation)["log_loss"], 5)


def main(small_rows=200_000, paper_rows=1_000_000):
    with tempfile.TemporaryDirectory() as folder:
        small = str(toy_data(folder, small_rows)[0].path)
        paper = str(toy_data(folder, paper_rows)[0].path)
        jobs = [(paper, "paper", *search) for search in searches("toy")]
        jobs += [(small, "small", *search) for search in searches("toy")]
        jobs += [("MovieLens", "small", *search) for search in searches("MovieLens")]
        losses = in_parallel(validation_loss, jobs)
    columns = ["data", "layers", "optimizer", "model", "learning_rate"]
    table = pd.DataFrame(jobs, columns=columns).assign(log_loss=losses)
    table = table.replace({"data": {small: "toy", paper: "toy"}})
    save(table, "learning_rates", (small_rows, paper_rows) == (200_000, 1_000_000))
    runs = table.groupby(["layers", "data", "model", "optimizer"])
    print(runs["log_loss"].apply(list).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
