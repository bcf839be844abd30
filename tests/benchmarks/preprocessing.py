"""Toy Criteo files: writing, preprocessing, a shuffled epoch, beside polars only reading; kills.

python tests/benchmarks/preprocessing.py            1, 3 and 10 million rows, 20 kills (10 GB)
python tests/benchmarks/preprocessing.py 45840617   that many rows instead, no kills (35 GB)
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import dlrm_utils  # noqa: E402
from data import toy_clicks  # noqa: E402


def command(raw, processed):
    """A preprocess command as a process of its own, so that its memory is its own."""
    arguments = [
        sys.executable,
        str(ROOT / "dlrm_utils.py"),
        "preprocess",
        str(raw),
        str(processed),
    ]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def preprocessed(raw, processed):
    """(seconds by the closing line, the most anonymous memory in GB, page cache left out)."""
    process, most = command(raw, processed), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max([most, *map(int, re.findall(r"RssAnon:\s+(\d+)", status))])
        time.sleep(0.05)
    return float(re.search(r"in ([\d.]+) s", process.stdout.read())[1]), most / 1e6


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(folder, rows):
    raw, processed = folder / "toy.txt", folder / "toy"
    writing = seconds_of(lambda: toy_clicks.write_toy_criteo(raw, rows))
    seconds, memory = preprocessed(raw, processed)
    line = f"{rows:>11,} rows: written {rows / writing:,.0f} rows/s; preprocessed {seconds:.1f} s, "
    line += f"{rows / seconds:,.0f} rows/s, RssAnon {memory:.2f} GB"
    if rows <= 10_000_000:  # polars holds everything in memory
        options = {"separator": "\t", "has_header": False, "quote_char": None}
        reading = seconds_of(lambda: polars.read_csv(raw, schema=dlrm_utils.SCHEMA, **options))
        line += f"; polars only reads {rows / reading:,.0f} rows/s"
    print(line)
    opening = seconds_of(lambda: dlrm_utils.load_criteo(processed))
    data = dlrm_utils.load_criteo(processed)
    order = dlrm_utils.shuffled_rows(data.train, seed=0)
    batches = [order[k : k + 2048] for k in range(0, len(order), 2048)]
    epoch = seconds_of(lambda: [data.batch(batch) for batch in batches])
    rate = f"{len(order) / epoch:,.0f} rows/s"
    print(f"{'':17} opened in {1000 * opening:.0f} ms; a shuffled epoch {rate}")
    shutil.rmtree(processed)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(folder, rows=300_000, kills=20):
    """Kill at random moments, run again to the end, compare with an undisturbed run."""
    raw, rng = folder / "toy.txt", random.Random(0)
    toy_clicks.write_toy_criteo(raw, rows)
    undisturbed = seconds_of(lambda: command(raw, folder / "undisturbed").wait())
    expected, equal, left = files(folder / "undisturbed"), 0, []
    for _ in range(kills):
        process = command(raw, folder / "killed")
        time.sleep(rng.uniform(0.4, 1.0) * undisturbed)
        process.send_signal(signal.SIGKILL)
        process.wait()
        stages = sorted(path.name for path in (folder / "killed.making").glob("*/*/*"))
        left.append("+".join(stages) or ("all" if (folder / "killed").exists() else "nothing"))
        assert command(raw, folder / "killed").wait() == 0
        assert not (folder / "killed.making").exists()
        equal += files(folder / "killed") == expected
        shutil.rmtree(folder / "killed")
    print(f"{kills} kills: {equal} folders equal, byte for byte, after a second run")
    print("what the kills left:", {kind: left.count(kind) for kind in sorted(set(left))})


def main():
    sizes = [int(size) for size in sys.argv[1:]] or [1_000_000, 3_000_000, 10_000_000]
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        for rows in sizes:
            measure(Path(folder), rows)
        if len(sys.argv) == 1:
            killed(Path(folder))


if __name__ == "__main__":
    main()
