"""The whole job at Criteo's size: 45,840,617 toy rows, from raw text to a trained model.

One epoch, the paper's layers, on the GPU where there is one; a number as argument gives other rows.
Prints wall times, peak memory besides the page cache, and the scores on 500,000 test rows. Writes
figures/measured/full_size_run.csv. Needs 25 GB of disk. Some 20 minutes.
"""

import contextlib
import math
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import torch

from shared import (
    LAYERS,
    ROOT,
    best_possible,
    bfloat16_or_say_so,
    dlrm_utils,
    notebook,
    save,
    toy_clicks,
)

ROWS = 45_840_617
BATCH_SIZE, RATE, EVALUATIONS = 1024, 2.0, 20


@contextlib.contextmanager
def watched_memory(every=0.5):
    """Gives a list whose only item, at the end, is the peak of unmapped memory in GB (Linux)."""
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(every):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def timed(what):
    """Prints how long something took; gives a list that then holds the seconds."""
    seconds, started = [], time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - started)
    print(f"{what}: {seconds[0]:.0f} s", flush=True)


def trained(data, folder, device):
    """The model after one epoch, and its history."""
    torch.manual_seed(0)
    narrow = bfloat16_or_say_so(device)
    model = notebook.StackedDLRM(data.table_sizes, 16, *LAYERS["paper"], bfloat16=narrow).to(device)
    every = max(1, math.ceil(len(data.train) / BATCH_SIZE) // EVALUATIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    history, _ = notebook.train_long(model, optimizer, data, BATCH_SIZE, folder, every)
    return model, history


def main(rows=ROWS):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder, watched_memory() as peak:
        raw = Path(folder) / "toy.txt"
        with timed("toy file written"):
            truth = toy_clicks.write_toy_criteo(raw, rows)
        with timed("preprocessed") as prepared:
            data = dlrm_utils.preprocess_criteo(raw, raw.with_suffix(""), min_count=10)
        test = data.test[:500_000]
        best = best_possible(data, truth, test)
        del truth
        with timed(f"trained on {device}, evaluated and saved") as training:
            model, history = trained(data, Path(folder) / "run", device)
        result = notebook.evaluate(model, data.batch(test))
    table = pd.DataFrame(history, columns=["step", "log_loss"]).round(5)
    table = table.assign(
        data="toy",
        rows=(table["step"] * BATCH_SIZE).clip(upper=len(data.train)),
        truth_log_loss=round(best["log_loss"], 5),
        entropy=round(notebook.entropy_of(result["base_rate"]), 5),
        preprocess_seconds=round(prepared[0]),
        train_seconds=round(training[0]),
        peak_gb=round(peak[0], 2),
    )
    save(table, "full_size_run", rows == ROWS)
    speed = len(data.train) / training[0]
    print(f"{rows:,} rows, {notebook.count(model):,} parameters, {speed:,.0f} rows/s trained")
    print(f"peak memory besides the page cache: {peak[0]:.2f} GB")
    for name, score in (("DLRM", result), ("best possible", best)):
        print(f"test, {name}: AUC {score['auc']:.4f}, log loss {score['log_loss']:.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
