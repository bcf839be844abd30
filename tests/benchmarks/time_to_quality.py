"""Seconds of training until a log loss: the stacked model against the 26 tables, one epoch each.

10 million toy rows (a number as argument gives another). The goal is the validation log loss that
26 tables, batches of 128 and SGD at 0.1 reach after an epoch. Against them the stacked model:
batches of 1024, bfloat16 where there is, SGD at 2, and 7 of 10 rows, so that the fall of the rate
over the last fifth comes early. Evaluations are not counted. Some 20 minutes. Writes
figures/measured/time_to_quality.csv.
"""

import math
import sys
import tempfile
import time

import pandas as pd
import torch

from shared import LAYERS, bfloat16_or_say_so, notebook, save, toy_data

COLUMNS = ["step", "seconds", "log_loss"]


def curve_of(model, optimizer, data, rows, batch_size, evaluations):
    """Validation log loss against seconds of training, so many times in an epoch: a DataFrame."""
    validation = data.batch(data.validation[:100_000])
    total = math.ceil(len(rows) / batch_size)
    steps = {round(total * k / evaluations) for k in range(1, evaluations + 1)}
    curve, seconds, started = [], 0.0, time.perf_counter()

    def after_step(step, logits, labels):
        nonlocal seconds, started
        if step + 1 in steps:
            seconds += time.perf_counter() - started
            loss = notebook.evaluate(model, validation)["log_loss"]
            curve.append((step + 1, round(seconds, 2), round(loss, 5)))
            started = time.perf_counter()

    notebook.train(model, data.batch, rows, optimizer, batch_size, after_step=after_step)
    return pd.DataFrame(curve, columns=COLUMNS)


def main(rows=10_000_000):
    narrow = bfloat16_or_say_so()
    with tempfile.TemporaryDirectory() as folder:
        data, _ = toy_data(folder, rows)
        torch.manual_seed(0)
        stacked = notebook.StackedDLRM(data.table_sizes, 16, *LAYERS["paper"], bfloat16=narrow)
        optimizer = torch.optim.SGD(stacked.parameters(), lr=2.0)
        fast = curve_of(stacked, optimizer, data, data.train[: rows * 7 // 10], 1024, 40)
        torch.manual_seed(0)
        taught = notebook.DLRM(data.table_sizes, 16, *LAYERS["paper"])
        optimizer = torch.optim.SGD(taught.parameters(), lr=0.1)
        slow = curve_of(taught, optimizer, data, data.train, 128, 10)
    way = f"stacked, batch 1024, SGD 2, {'bfloat16' if narrow else '32 bits'}"
    table = pd.concat([slow.assign(way="26 tables, batch 128, SGD 0.1"), fast.assign(way=way)])
    save(table.assign(data="toy"), "time_to_quality", rows == 10_000_000)
    goal, seconds = slow["log_loss"].iloc[-1], slow["seconds"].iloc[-1]
    reached = fast[fast["log_loss"] <= goal]["seconds"].min()
    print(f"log loss {goal:.4f}: the 26 tables take {seconds:.0f} s, the stacked model", end=" ")
    print("never gets there" if math.isnan(reached) else f"{reached:.0f} s")
    print(f"its epoch ends at {fast['log_loss'].iloc[-1]:.4f}, {fast['seconds'].iloc[-1]:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
