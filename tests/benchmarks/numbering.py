"""Peak memory of numbering one column: with the same names it must not grow with the rows.

python tests/benchmarks/numbering.py                     50, 100, 200 million rows, a million names
python tests/benchmarks/numbering.py ROWS MILLION_NAMES  in millions: 330 300 needs 5 GB of memory
"""

import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import dlrm_utils  # noqa: E402

SIZES = [(50, 1), (100, 1), (200, 1)]
PIECE = 1_000_000  # rows of a file
MILLION = 1_000_000


def own_memory():
    """This process's anonymous memory in GB, page cache left out."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1e6


def write_column(folder, rows, names):
    """A column's pieces as stage 1 leaves them; every name at least once, if there are rows."""
    folder.mkdir(parents=True)
    factor = np.uint64(2654435761)  # odd, so different places get different names
    for start in range(0, rows, PIECE):
        place = np.arange(start, start + PIECE, dtype=np.uint64) % np.uint64(names)
        values = (place * factor % np.uint64(1 << 32)).astype(np.uint32)
        row = np.arange(start, start + PIECE)
        pl.DataFrame({"0": values, "row": row}).write_parquet(folder / f"{start:012}")
    return sorted(folder.iterdir())


def number(rows, names):
    """Print seconds and the most memory of one column's stage 2."""
    with tempfile.TemporaryDirectory() as folder:
        parts = write_column(Path(folder) / "parts", rows, names)
        most, done = [own_memory()], threading.Event()

        def watch():
            while not done.wait(0.05):
                most.append(own_memory())

        threading.Thread(target=watch, daemon=True).start()
        start = time.perf_counter()
        counts, source = (rows * 6 // 7, rows), {"min_count": 1}
        with dlrm_utils._engine(parts, Path(folder) / "spilled") as engine:
            dlrm_utils._number_column(engine, Path(folder), 0, "0", counts, source)
        seconds = time.perf_counter() - start
        done.set()
    memory = f"{most[0]:.2f} GB before, {max(most):.2f} at most"
    print(f"{rows:>11,} rows, {names:>11,} names: {seconds:6.1f} s, RssAnon {memory}", flush=True)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments:
        rows, names = (int(value) * MILLION for value in arguments)
        number(rows, names)
        return
    for size in SIZES:  # each in a process of its own, so that its memory is its own
        subprocess.run([sys.executable, __file__, *map(str, size)], check=True)


if __name__ == "__main__":
    main()
