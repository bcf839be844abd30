"""MovieLens-100K, newest 10 % of the ratings: logistic regression, matrix factorization and DLRM as section 12 trains them, three seeds.

Runs the notebook's own section 12 cells up to `fit_best`, then trains with other seeds.
"""
import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions


def section_12():
    """The notebook's definitions, and the frames and batches that its section 12 makes."""
    namespace = vars(notebook_definitions.load())
    cells = [notebook_definitions.source(cell) for cell in notebook_definitions.code_cells()]
    first = next(k for k, text in enumerate(cells) if "fetch_movielens" in text)
    last = next(k for k, text in enumerate(cells) if "def fit_best" in text)
    namespace["seed"] = 0
    with contextlib.redirect_stdout(io.StringIO()):
        for text in cells[first:last + 1]:
            exec(text, namespace)
    assert namespace["real_people"], "MovieLens-100K could not be fetched"
    return namespace


def main():
    book = section_12()
    sizes = book["encoder"].table_sizes
    models = {
        "logistic regression": (lambda: book["LogisticRegression"](sizes, num_dense=2), 1e-2),
        "matrix factorization": (lambda: book["MatrixFactorization"](sizes, 16), 3e-3),
        "DLRM": (lambda: book["DLRM"](sizes, 16, [16], [32], num_dense=2), 1e-3),
    }
    for name, (new_model, rate) in models.items():
        results = []
        for seed in range(3):
            torch.manual_seed(seed)
            result = book["evaluate"](book["fit_best"](new_model(), rate, seed=seed), book["films_test"])
            results.append((result["auc"], result["log_loss"]))
        for seed, (auc, loss) in enumerate(results):
            print(f"{name}, seed {seed}: AUC {auc:.4f}, log loss {loss:.4f}")
        print(f"{name}, mean: AUC {np.mean(results, 0)[0]:.4f}, log loss {np.mean(results, 0)[1]:.4f}")


if __name__ == "__main__":
    main()
