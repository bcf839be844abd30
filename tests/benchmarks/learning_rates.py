"""The learning rates of the comparison, for each model and optimizer: one epoch each.

Log loss on validation rows of 200,000 toy clicks with section 11's layers, of 1,000,000 with the
paper's; a number as argument gives both other rows. The grids were widened until no kept rate lay
at an edge. Five minutes, and twenty for the million. Writes figures/measured/learning_rates.csv.
"""

import sys
import tempfile

import pandas as pd

from shared import PUBLISHED, ROWS, clicks_of, in_parallel, one_epoch, save, toy_data

RATES = {
    ("small", "Adagrad"): {
        "logistic regression": [0.02, 0.04, 0.08],
        "factorization machine": [0.01, 0.02, 0.04],
        "plain MLP": [0.02, 0.04, 0.08],
        "DCN": [0.01, 0.02, 0.04],
        "DLRM": [0.02, 0.04, 0.08],
        PUBLISHED: [0.01, 0.02, 0.04],
    },
    ("small", "SGD"): {
        "logistic regression": [0.1, 0.3, 1],
        "factorization machine": [0.05, 0.1, 0.2],
        "plain MLP": [0.3, 1, 3],
        "DCN": [0.05, 0.1, 0.2],
        "DLRM": [0.3, 1, 3],
        PUBLISHED: [0.3, 1, 3, 6],
    },
    ("paper", "Adagrad"): {
        "logistic regression": [0.01, 0.02, 0.04, 0.08],
        "factorization machine": [0.005, 0.01, 0.02, 0.04, 0.08],
        "plain MLP": [0.01, 0.02, 0.04],
        "DCN": [0.005, 0.01, 0.02, 0.04],
        "DLRM": [0.01, 0.02, 0.04],
        PUBLISHED: [0.005, 0.01, 0.02, 0.04],
    },
    ("paper", "SGD"): {
        "logistic regression": [0.1, 0.3, 1],
        "factorization machine": [0.05, 0.1, 0.2],
        "plain MLP": [0.3, 1, 3],
        "DCN": [0.05, 0.1, 0.2],
        "DLRM": [0.3, 1, 3, 6],
        PUBLISHED: [0.3, 1, 3, 6],
    },
}


def searches():
    """(layers, optimizer, model, rate) of every run."""
    for (layers, optimizer), rates_of in RATES.items():
        for name, rates in rates_of.items():
            yield from [(layers, optimizer, name, rate) for rate in rates]


def validation_loss(folder, layers, optimizer, name, rate):
    """After one epoch; infinite if training ran away."""
    clicks = clicks_of(folder)
    try:
        _, curve = one_epoch(clicks, layers, name, optimizer, rate, points=1)
    except ValueError:  # scikit-learn's, of predictions that are not numbers
        return float("inf")
    return round(curve["validation log loss"].iloc[-1], 5)


def main(rows=None):
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for layers, own in ROWS.items():
            data = str(toy_data(folder, rows or own)[0].path)
            jobs = [(data, *search) for search in searches() if search[0] == layers]
            losses += in_parallel(validation_loss, jobs)
    columns = ["layers", "optimizer", "model", "learning_rate"]
    table = pd.DataFrame(searches(), columns=columns).assign(log_loss=losses)
    save(table, "learning_rates", rows is None)
    runs = table.groupby(["layers", "optimizer", "model"])
    print(runs["log_loss"].apply(list).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
