"""Does the disk-friendly shuffle harm the model? One epoch on 1,000,000 toy rows, both ways.

Both on the file as it is, and on a file sorted by its first integer, where neighbours are alike.
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dlrm_models  # noqa: E402
import dlrm_utils  # noqa: E402
from data import toy_clicks  # noqa: E402

book = dlrm_models.load_notebook()
torch.sparse.check_sparse_tensor_invariants.disable()
ORDERS = {
    "plain permutation": lambda rows, seed: np.random.default_rng(seed).permutation(rows),
    "shuffled_rows": dlrm_utils.shuffled_rows,
}


def trained(data, rows, order, seed):
    torch.manual_seed(seed)
    model = book.DLRM(data.table_sizes, 16, [64], [64])
    with mock.patch.object(dlrm_utils, "shuffled_rows", order):
        book.train(
            model,
            data.batch,
            rows,
            torch.optim.Adagrad(model.parameters(), lr=0.04),
            512,
            seed=seed,
        )
    return book.evaluate(model, data.batch(range(data.test.start, data.test.start + 50_000)))


def main():
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "toy.txt"
        toy_clicks.write_toy_criteo(raw, 1_000_000)
        data = dlrm_utils.preprocess_criteo(raw, Path(folder) / "toy", min_count=10, progress=False)
        by_first_integer = np.argsort(data.dense[: data.train.stop, 0], kind="stable")
        for kind, rows in [("as it is", np.arange(data.train.stop)), ("sorted", by_first_integer)]:
            for name, order in ORDERS.items():
                scores = [trained(data, rows, order, seed) for seed in range(2)]
                print(
                    f"file {kind}, {name}: AUC "
                    + ", ".join(f"{s['auc']:.4f}" for s in scores)
                    + "; log loss "
                    + ", ".join(f"{s['log_loss']:.4f}" for s in scores)
                )


if __name__ == "__main__":
    main()
