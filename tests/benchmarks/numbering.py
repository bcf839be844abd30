"""Numbering one table's names: seconds and memory follow the names, not the rows.

python tests/benchmarks/numbering.py                     50, 100, 200 million rows, a million names
python tests/benchmarks/numbering.py ROWS MILLION_NAMES  in millions: 330 300 needs 12 GB of disk
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
from data import folder  # noqa: E402

SIZES = [(50, 1), (100, 1), (200, 1)]
PART = 131_072  # rows that have one dictionary
MILLION = 1_000_000


def own_memory():
    """This process's anonymous memory in GB, page cache left out."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1e6


def dictionaries(rows, names):
    """What stage 1 leaves of a column of 32-bit names: of each part its names and their counts."""
    factor = np.uint64(2654435761)  # odd, so different places get different names
    for start in range(0, rows, PART):
        place = np.arange(start, min(start + PART, rows), dtype=np.uint64) % np.uint64(names)
        distinct, counts = np.unique(place * factor % np.uint64(1 << 32), return_counts=True)
        texts = pl.Series(distinct).cast(pl.String).str.zfill(10)
        yield pl.DataFrame({"name": texts, "count": counts.astype(np.uint32)})


def number(rows, names):
    """Print seconds and the most memory of one table's stage 2."""
    most, done = [own_memory()], threading.Event()

    def watch():
        while not done.wait(0.05):
            most.append(own_memory())

    entries = sum(min(PART, rows - start, names) for start in range(0, rows, PART))
    size = (10 + folder.ENTRY) * entries
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as spilled:
        kept, ids = folder.merged(dictionaries(rows, names), size, Path(spilled) / "spilled")
        found = sum(map(len, kept))
    seconds = time.perf_counter() - start
    done.set()
    assert found == min(rows, names) and len(ids) == entries
    where = "on the disk" if size > folder.MERGE_MEMORY else "in memory"
    memory = f"{most[0]:.2f} GB before, {max(most):.2f} at most"
    print(f"{rows:>11,} rows, {names:>11,} names, {where}: {seconds:6.1f} s, RssAnon {memory}")


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
