"""What the README promises of toy clicks: logistic regression, DLRM and the best possible score.

200,000 rows (a number as argument gives another), one epoch, small layers, three seeds, test rows.
And the control: the same file without a signal, AUC and log loss minus entropy. Some 2 minutes.
"""

import sys
import tempfile

import torch

from shared import BATCH_SIZE, SEEDS, best_possible, notebook, toy_data


def trained(data, new_model, rate, seed):
    """The test score of a new model after one epoch."""
    torch.manual_seed(seed)
    model = new_model(data.table_sizes)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=rate)
    notebook.train(model, data.batch, data.train, optimizer, BATCH_SIZE, seed=seed)
    return notebook.evaluate(model, data.batch(data.test))


def new_dlrm(table_sizes):
    return notebook.DLRM(table_sizes, 16, [64], [64])


def shown(score):
    return f"AUC {score['auc']:.4f}, log loss {score['log_loss']:.4f}"


def main(rows=200_000):
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_data(folder, rows)
        control, _ = toy_data(folder, rows, signal=False)
        best = best_possible(data, truth)
        print("best possible:", shown(best))
        for seed in SEEDS:
            logistic = trained(data, notebook.LogisticRegression, 0.05, seed)
            dlrm = trained(data, new_dlrm, 0.04, seed)
            way = (logistic["auc"] - dlrm["auc"]) / (logistic["auc"] - best["auc"])
            print(
                f"seed {seed}: logistic regression {shown(logistic)}; DLRM {shown(dlrm)};", end=" "
            )
            print(f"{way:.1%} of the way in AUC")
        for seed in SEEDS:
            result = trained(control, new_dlrm, 0.04, seed)
            above = result["log_loss"] - notebook.entropy_of(result["base_rate"])
            print(
                f"no signal, seed {seed}: AUC {result['auc']:.4f}, log loss - entropy {above:+.4f}"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
