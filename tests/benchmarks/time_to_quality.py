"""Time to quality: seconds of training until the validation log loss that batch 128, SGD at 0.1, 26 tables reach after one epoch of 10 million toy rows.

Against it, section 14's stacked model: batch 1024, bfloat16, SGD at 2, and only the first 7 million rows, so that the fall of the rate over the last fifth
comes early. Evaluations are not counted. Prints both, and writes the log loss against seconds to figures/measured/time_to_quality.csv.
"""
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions

book = notebook_definitions.load()
os.chdir(notebook_definitions.ROOT)
LAYERS = ([512, 256, 64], [512, 256])
torch.sparse.check_sparse_tensor_invariants.disable()


def curve_of(model, optimizer, data, rows, batch_size, evaluations):
    """Validation log loss against seconds of training, `evaluations` times in an epoch over rows: a DataFrame."""
    validation, total = data.batch(data.validation[:100_000]), -(-len(rows) // batch_size)
    steps = {round(total * k / evaluations) - 1 for k in range(1, evaluations + 1)}
    curve, seconds, started = [], 0.0, time.perf_counter()

    def after_step(step, logits, labels):
        nonlocal seconds, started
        if step in steps:
            seconds += time.perf_counter() - started
            curve.append(dict(step=step + 1, seconds=round(seconds, 2), log_loss=round(book.evaluate(model, validation)["log_loss"], 5)))
            print(curve[-1], flush=True)
            started = time.perf_counter()

    book.train(model, data.batch, rows, optimizer, batch_size, after_step=after_step)
    return pd.DataFrame(curve)


def main(rows=10_000_000):
    with tempfile.TemporaryDirectory() as folder:
        book.dlrm_utils.write_toy_criteo(f"{folder}/toy.txt", rows)
        data = book.dlrm_utils.preprocess_criteo(f"{folder}/toy.txt", f"{folder}/toy.npz", min_count=10)
        torch.manual_seed(0)
        ours = book.StackedDLRM(data.table_sizes, 16, *LAYERS, bfloat16=True)
        fast = curve_of(ours, book.RowSGD(ours.parameters(), lr=2.0), data, data.train[:7_000_000], 1024, 40)
        torch.manual_seed(0)
        taught = book.DLRM(data.table_sizes, 16, *LAYERS)
        slow = curve_of(taught, torch.optim.SGD(taught.parameters(), lr=0.1), data, data.train, 128, 10)
    table = pd.concat([slow.assign(way="26 tables, batch 128, SGD 0.1"), fast.assign(way="stacked, batch 1024, SGD 2, bfloat16")])
    table.assign(data="toy").to_csv("figures/measured/time_to_quality.csv", index=False)
    goal, seconds = slow["log_loss"].iloc[-1], slow["seconds"].iloc[-1]
    reached = fast[fast["log_loss"] <= goal]
    print(f"the 26 tables reach {goal:.4f} in {seconds:.0f} s; ours "
          + (f"in {reached['seconds'].iloc[0]:.0f} s, {reached['seconds'].iloc[0] / seconds:.3f} of it" if len(reached) else "never")
          + f", and {fast['log_loss'].iloc[-1]:.4f} at the end of the epoch after {fast['seconds'].iloc[-1]:.0f} s")


if __name__ == "__main__":
    main()
