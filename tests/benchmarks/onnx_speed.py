"""A DLRM of MovieLens's table sizes, exported to ONNX: largest difference from PyTorch and median times, ragged bags."""
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions

book = notebook_definitions.load()
TABLE_SIZES = [752, 1617, 3, 22, 20]
NAMES = ["dense", *[f"indices_{t}" for t in range(5)], *[f"offsets_{t}" for t in range(5)]]


def random_batch(rows):
    """One id in the first four tables, a bag of 0 to 6 ids in the last."""
    rng = np.random.default_rng(rows)
    longest = [1, 1, 1, 1, 6]
    lengths = [rng.integers(0 if n > 1 else 1, n + 1, rows) for n in longest]
    pairs = [book.to_offsets([rng.integers(0, size, n).tolist() for n in counts]) for size, counts in zip(TABLE_SIZES, lengths)]
    return torch.randn(rows, 2), [i for i, _ in pairs], [o for _, o in pairs]


def median_ms(calls, repeats=200):
    """Medians of several calls, taken in turn, so that a slow moment of the machine hits all."""
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, record in zip(calls, times):
            start = time.perf_counter()
            call()
            record.append(1000 * (time.perf_counter() - start))
    return [float(np.median(record)) for record in times]


def main():
    torch.manual_seed(0)
    model = book.DLRM(TABLE_SIZES, 16, [16], [32], num_dense=2).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        free = ({0: "batch"}, [{0: f"ids_{t}"} for t in range(5)], [{0: "batch"}] * 5)
        book.dlrm_utils.export_onnx(model, random_batch(5), Path(folder) / "model.onnx", NAMES, free)
        session = onnxruntime.InferenceSession(Path(folder) / "model.onnx")
        for rows in (1, 7, 1000):
            dense, indices, offsets = random_batch(rows)
            feed = {name: t.numpy() for name, t in zip(NAMES, [dense, *indices, *offsets], strict=True)}
            difference = np.abs(session.run(None, feed)[0] - model(dense, indices, offsets).numpy()).max()
            by_torch, by_onnx = median_ms([lambda: model(dense, indices, offsets), lambda: session.run(None, feed)])
            print(f"{rows:4} rows: largest difference {difference:.1e}; PyTorch {by_torch:.3f} ms, "
                  f"onnxruntime {by_onnx:.3f} ms, ratio {by_torch / by_onnx:.2f}")


if __name__ == "__main__":
    main()
