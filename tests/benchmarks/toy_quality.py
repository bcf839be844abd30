"""Toy clicks, 200,000 rows, test rows: the ceiling, logistic regression and DLRM as section 9 and 10 train them, three seeds.

And the control without signal: AUC and log loss minus entropy.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions

book = notebook_definitions.load()
ROWS, BATCH_SIZE = 200_000, 256
torch.sparse.check_sparse_tensor_invariants.disable()


def toy_file(folder, signal):
    truth = book.dlrm_utils.write_toy_criteo(folder / "toy.txt", ROWS, signal=signal)
    return book.dlrm_utils.preprocess_criteo(folder / "toy.txt", folder / f"{signal}.npz", min_count=10), truth


def trained(data, new_model, rate, seed):
    torch.manual_seed(seed)
    model = new_model()
    book.train(model, data.batch, data.train, torch.optim.Adagrad(model.parameters(), lr=rate), BATCH_SIZE, seed=seed)
    return book.evaluate(model, data.batch(data.test))


def main():
    with tempfile.TemporaryDirectory() as folder:
        data, truth = toy_file(Path(folder), signal=True)
        control, _ = toy_file(Path(folder), signal=False)
        test = slice(data.test.start, data.test.stop)
        ceiling = book.score(data.labels[test], truth[test])
        new_dlrm = lambda: book.DLRM(data.table_sizes, 16, [64], [64])
        print(f"ceiling: AUC {ceiling['auc']:.4f}, log loss {ceiling['log_loss']:.4f}")
        for seed in range(3):
            logistic = trained(data, lambda: book.LogisticRegression(data.table_sizes), 0.05, seed)
            dlrm = trained(data, new_dlrm, 0.04, seed)
            closed = {m: (dlrm[m] - logistic[m]) / (ceiling[m] - logistic[m]) for m in ("auc", "log_loss")}
            print(f"seed {seed}: logistic regression AUC {logistic['auc']:.4f}, log loss {logistic['log_loss']:.4f}; "
                  f"DLRM AUC {dlrm['auc']:.4f}, log loss {dlrm['log_loss']:.4f}; "
                  f"way to the ceiling: {closed['auc']:.1%} in AUC, {closed['log_loss']:.1%} in log loss")
        for seed in range(3):
            result = trained(control, lambda: book.DLRM(control.table_sizes, 16, [64], [64]), 0.04, seed)
            p = result["base_rate"]
            entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
            print(f"control, seed {seed}: AUC {result['auc']:.4f}, log loss minus entropy {result['log_loss'] - entropy:+.4f}")


if __name__ == "__main__":
    main()
