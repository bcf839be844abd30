"""Preprocessing toy Criteo files: rows/s, peak memory, beside a fast CSV reader and plain Python; kills; a shuffled epoch.

    python tests/benchmarks/preprocessing.py              1, 3 and 10 million rows, 20 kills (about 3 minutes, 6 GB of disk)
    python tests/benchmarks/preprocessing.py 45840617     that many rows instead (26 GB of disk), no kills
"""
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import dlrm_utils


def command(raw, processed):
    """A preprocess command as a process of its own, so that its peak memory is its own."""
    arguments = [sys.executable, str(ROOT / "dlrm_utils.py"), "preprocess", str(raw), str(processed)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def preprocessed(raw, processed):
    """(seconds, peak memory in GB) from the command's own closing line."""
    line, _ = command(raw, processed).communicate()
    return float(re.search(r"in ([\d.]+) s", line)[1]), float(re.search(r"([\d.]+) GB", line)[1])


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def polars_read(raw):
    """Read the text into columns, and nothing more: no check, no vocabulary, no file."""
    dtypes = [polars.UInt8] + [polars.Int32] * 13 + [polars.String] * 26
    names = dlrm_utils.COLUMNS
    polars.read_csv(raw, separator="\t", has_header=False, new_columns=names, schema_overrides=dict(zip(names, dtypes)))


def python_read(raw, rows=50_000):
    """The line-by-line parser on some rows."""
    with open(raw, encoding="ascii") as file:
        dlrm_utils._parse_lines([next(file) for _ in range(rows)], raw, 1)
    return rows


def measure(folder, rows):
    raw, processed = folder / "toy.txt", folder / "toy.npz"
    writing = seconds_of(lambda: dlrm_utils.write_toy_criteo(raw, rows))
    seconds, memory = preprocessed(raw, processed)
    line = f"{rows:>11,} rows: written {rows / writing:>9,.0f} rows/s; preprocessed {seconds:6.1f} s, {rows / seconds:>9,.0f} rows/s, peak {memory:.2f} GB"
    if rows <= 10_000_000:                                     # polars holds everything in memory
        reading = seconds_of(lambda: polars_read(raw))
        line += f"; polars only reads {rows / reading:>9,.0f} rows/s (ratio {reading / seconds:.2f})"
    python = seconds_of(lambda: python_read(raw, min(rows, 50_000)))
    print(line + f"; plain Python parses {min(rows, 50_000) / python:>7,.0f} rows/s")
    opening = seconds_of(lambda: dlrm_utils.load_criteo(processed))
    data = dlrm_utils.load_criteo(processed)
    order = dlrm_utils.shuffled_rows(data.train, seed=0)
    epoch = seconds_of(lambda: [data.batch(order[k:k + 2048]) for k in range(0, len(order), 2048)])
    print(f"{'':17} opened in {1000 * opening:.0f} ms, {sum(data.table_sizes):,} table rows; a shuffled epoch {len(order) / epoch:,.0f} rows/s")
    processed.unlink()


def killed(folder, rows=300_000, kills=20):
    """Kill at random moments, run again to the end, compare with an undisturbed run."""
    raw = folder / "toy.txt"
    dlrm_utils.write_toy_criteo(raw, rows)
    undisturbed = seconds_of(lambda: command(raw, folder / "undisturbed.npz").wait())      # already compiled: see main
    expected, rng, equal, alive = (folder / "undisturbed.npz").read_bytes(), random.Random(0), 0, 0
    for _ in range(kills):
        process = command(raw, folder / "killed.npz")
        time.sleep(rng.uniform(0.2, 1.0) * undisturbed)
        alive += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert command(raw, folder / "killed.npz").wait() == 0
        equal += (folder / "killed.npz").read_bytes() == expected
        (folder / "killed.npz").unlink()
    print(f"{kills} kills at random moments ({alive} of them before the end): {equal} files equal byte for byte after a second run")


def main():
    sizes = [int(size) for size in sys.argv[1:]] or [1_000_000, 3_000_000, 10_000_000]
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        dlrm_utils.write_toy_criteo(Path(folder) / "small.txt", 1_000)
        preprocessed(Path(folder) / "small.txt", Path(folder) / "small.npz")       # Numba compiles once, for all later runs
        for rows in sizes:
            measure(Path(folder), rows)
        if len(sys.argv) == 1:
            killed(Path(folder))


if __name__ == "__main__":
    main()
