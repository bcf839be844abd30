"""Speed of what a table of one's own needs: FrameEncoder, Batch.take, to_offsets, in one process.

python tests/benchmarks/frames.py [ROWS] [OTHER.py]   a million rows; another version of dlrm_utils
"""

import importlib.util
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NUMBERS = [f"number {k}" for k in range(13)]
NAMES = [f"name {k}" for k in range(26)]


def module_at(path):
    """The module in a file, whatever its name."""
    spec = importlib.util.spec_from_file_location("measured", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_frame(rows):
    """13 numbers and 26 categories: half of them texts, half numbers, with long tails."""
    rng = np.random.default_rng(0)
    frame = {name: rng.normal(size=rows) for name in NUMBERS}
    for k, name in enumerate(NAMES):
        ranks = rng.zipf(1.3, rows) % 10 ** (1 + k % 6)
        frame[name] = pd.Series(ranks).map("{:08x}".format) if k % 2 else ranks
    return pd.DataFrame(frame)


def seconds(function):
    """(seconds of one call, its result)."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main(rows=1_000_000, path=ROOT / "dlrm_utils.py"):
    module, frame = module_at(path), made_frame(int(rows))
    encoder = module.FrameEncoder(dense=NUMBERS, categorical=NAMES)
    fit, _ = seconds(lambda: encoder.fit(frame))
    transform, batch = seconds(lambda: encoder.transform(frame))
    chosen = np.random.default_rng(0).integers(0, len(frame), (5, 256))
    take = min(seconds(lambda some=some: batch.take(some))[0] for some in chosen)
    bags = np.random.default_rng(0).integers(0, 1000, (len(frame) // 4, 4)).tolist()
    offsets = min(seconds(lambda: module.to_offsets(bags))[0] for _ in range(3))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    ids = sum(int(column.sum()) for column in batch.indices)
    print(f"{path}: {len(frame):,} rows; FrameEncoder with {len(NUMBERS)} and {len(NAMES)} columns")
    print(
        f"fit {fit:.2f} s, transform {transform:.2f} s, peak memory {peak:.2f} GB, sum of ids {ids}"
    )
    print(f"Batch.take of 256 rows {take * 1e3:.1f} ms; to_offsets of as many ids {offsets:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
