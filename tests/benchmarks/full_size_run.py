"""The whole job at Criteo's size: 45,840,617 toy rows, from raw text to a trained model, one epoch, with the paper's layers.

Prints wall times, peak memory (besides the page cache), AUC and log loss on 500,000 test rows, and the ceiling. Writes
figures/measured/full_size_run.csv. Needs 25 GB of disk; an argument gives another number of rows. With a GPU, the model is on it.
"""
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions

book = notebook_definitions.load()
os.chdir(notebook_definitions.ROOT)
torch.sparse.check_sparse_tensor_invariants.disable()
BATCH_SIZE, RATE, EVALUATIONS = 1024, 2.0, 20


def watch_memory(peaks, every=0.5):
    """Notes the highest memory of this process that is not a mapped file, in GB, until `peaks` is emptied."""
    while peaks:
        status = Path("/proc/self/status").read_text()
        peaks[0] = max(peaks[0], int(status.split("RssAnon:")[1].split()[0]) / 1e6)
        time.sleep(every)


def main(rows=45_840_617):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks, times = [0.0], [time.perf_counter()]
    threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
    with tempfile.TemporaryDirectory(dir="data") as folder:
        truth = book.dlrm_utils.write_toy_criteo(f"{folder}/toy.txt", rows)
        times.append(time.perf_counter())
        data = book.dlrm_utils.preprocess_criteo(f"{folder}/toy.txt", f"{folder}/toy.npz", min_count=10)
        times.append(time.perf_counter())
        print(data, flush=True)
        test = data.test[:500_000]
        ceiling = book.score(data.labels[test.start:test.stop], truth[test.start:test.stop])
        del truth
        torch.manual_seed(0)
        model = book.StackedDLRM(data.table_sizes, 16, [512, 256, 64], [512, 256], bfloat16=True).to(device)
        every = -(-len(data.train) // BATCH_SIZE) // EVALUATIONS
        history = book.train_long(model, book.RowSGD(model.parameters(), lr=RATE), data, BATCH_SIZE, f"{folder}/run", every)
        times.append(time.perf_counter())
        result = book.evaluate(model, data.batch(test))
        entropy = book.entropy_of(result["base_rate"])
        size = sum(p.numel() for p in model.parameters())
    written, prepared, trained = (end - start for start, end in zip(times, times[1:]))
    table = pd.DataFrame(history, columns=["step", "log_loss"]).round(5)
    table.assign(data="toy", rows=table["step"] * BATCH_SIZE, truth_log_loss=round(ceiling["log_loss"], 5), entropy=round(entropy, 5),
                 preprocess_seconds=round(prepared), train_seconds=round(trained), peak_gb=round(peaks[0], 2),
                 ).to_csv("figures/measured/full_size_run.csv", index=False)
    print(f"{rows:,} rows, {size:,} parameters, on {device}: toy file written in {written:.0f} s; preprocessed in {prepared:.0f} s; "
          f"trained, evaluated {len(history)} times and saved in {trained:.0f} s ({len(data.train) / trained:,.0f} rows/s); "
          f"peak {peaks[0]:.2f} GB besides the page cache")
    print(f"test: AUC {result['auc']:.4f}, log loss {result['log_loss']:.4f}; ceiling {ceiling['auc']:.4f}, {ceiling['log_loss']:.4f}; "
          f"entropy {entropy:.4f}")
    peaks.clear()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
