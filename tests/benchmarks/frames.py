"""Speed of what a table of one's own needs: FrameEncoder, Batch, to_offsets, one line of Criteo's.

python tests/benchmarks/frames.py [ROWS] [OTHER.py]   a million rows; another version of dlrm_utils
"""

import importlib.util
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.toy_clicks import write_toy_criteo  # noqa: E402

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
    few = batch.take(range(128))
    made, checked, line = median(
        lambda: module.one_id_each(few.dense, few.indices),
        lambda: module.Batch(*few),
        one_line(module),
    )
    print(f"128 rows: one_id_each {made:.3f} ms, Batch(...) with its checks {checked:.3f} ms")
    print(f"one raw line of Criteo's to a Batch {line:.3f} ms")


def median(*functions):
    """Milliseconds of the median of 200 calls of each function, after a first one."""
    return [
        1e3 * np.median([seconds(function)[0] for _ in range(201)][1:]) for function in functions
    ]


def one_line(module):
    """A function that encodes one line by the vocabularies of 20,000 toy clicks."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "toy.txt")
        write_toy_criteo(raw, 20_000)
        data = module.preprocess_criteo(raw, raw.with_name("p"), progress=False)
        line = raw.read_text().split("\n", 1)[0]
        data.encode([line])  # the vocabularies are read now
    return lambda: data.encode([line])


if __name__ == "__main__":
    main(*sys.argv[1:])
