"""Toy Criteo files: preprocessed beside another checkout, a shuffled epoch, kills, bags.

    python tests/benchmarks/preprocessing.py [--rows N ...] [--beside CHECKOUT] [--raw FILE]

Without --rows: 1, 3 and 10 million rows, then 20 kills and the bags of 100,000 ratings (10 GB).
--beside: the folder of another version, as `git worktree add ../other COMMIT` makes it; both take
turns in one run. --raw: a toy file of that many rows which is there already.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import dlrm_utils  # noqa: E402
from data import folder as stages  # noqa: E402
from data import toy_clicks  # noqa: E402


def command(raw, processed, root=ROOT):
    """A preprocess command as a process of its own, so that its memory is its own."""
    arguments = [sys.executable, "dlrm_utils.py", "preprocess", str(raw), str(processed)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(arguments, cwd=root, **output)


def preprocessed(raw, processed, root=ROOT):
    """(seconds by the closing line, the most anonymous memory in GB, page cache left out)."""
    process, most = command(raw, processed, root), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max([most, *map(int, re.findall(r"RssAnon:\s+(\d+)", status))])
        time.sleep(0.05)
    return float(re.search(r"in ([\d.]+) s", process.stdout.read())[1]), most / 1e6


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(folder, rows, beside=None, raw=None, turns=2):
    """Print rows/s and memory of both versions in turn, and of a shuffled epoch."""
    if raw is None:
        raw = folder / "toy.txt"
        toy_clicks.write_toy_criteo(raw, rows)
    for _ in range(turns):
        for name, root in {"before": beside, "now": ROOT}.items():
            if root is not None:
                shutil.rmtree(folder / name, ignore_errors=True)
                seconds, memory = preprocessed(raw, folder / name, root)
                speed = f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s, RssAnon {memory:.2f} GB"
                print(f"{rows:>11,} rows, {name:6}: {speed}", flush=True)
    if beside is not None:
        equal = [
            np.array_equal(*(np.load(folder / name / file, mmap_mode="r") for name in NAMES))
            for file in ("labels.npy", "dense.npy", "sparse.npy")
        ]
        print(f"{'':17} arrays equal: {all(equal)}")
    opening = seconds_of(lambda: dlrm_utils.load_criteo(folder / "now"))
    data = dlrm_utils.load_criteo(folder / "now")
    epoch = seconds_of(lambda: [*dlrm_utils.shuffled_batches(data.batch, data.train, 2048)])
    speed = f"{len(data.train) / epoch:,.0f} rows/s"
    print(f"{'':17} opened in {1000 * opening:.0f} ms; a shuffled epoch {speed}", flush=True)


NAMES = ("before", "now")


def files(folder):
    """All files by their names in the folder, as bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def killed(folder, rows=300_000, kills=20):
    """Kill while there are stages, run again to the end, compare with an undisturbed run."""
    raw, rng = folder / "kills.txt", random.Random(0)
    toy_clicks.write_toy_criteo(raw, rows)
    work = folder / "killed.making" / stages.STAGES
    undisturbed = command(raw, folder / "killed")
    wait_for(work)
    seconds = seconds_of(lambda: wait_for(folder / "killed"))
    undisturbed.wait()
    (folder / "killed").rename(folder / "undisturbed")
    expected, equal, left = files(folder / "undisturbed"), [], []
    while len(left) < kills:
        process = command(raw, folder / "killed")
        wait_for(work)  # not the imports: they take longer than the stages
        time.sleep(rng.uniform(0, 0.95) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if work.exists():  # else it was done
            left.append("+".join(sorted(path.name for path in work.glob("*/*"))))
        assert command(raw, folder / "killed").wait() == 0
        assert not (folder / "killed.making").exists()
        equal.append(files(folder / "killed") == expected)
        shutil.rmtree(folder / "killed")
    print(
        f"{kills} kills that met a stage, {len(equal) - kills} that came too late; after a second"
    )
    print(f"run {sum(equal)} of {len(equal)} folders are equal, byte for byte")
    print("what the kills left:", {kind: left.count(kind) for kind in sorted(set(left))})


def wait_for(path):
    """Until a folder is there."""
    while not path.exists():
        time.sleep(0.005)


def bags(folder, rows=100_000):
    """Ratings with bags of genres: a folder's batches beside those of a frame, an epoch's speed."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, rows)
    genres = pl.Series([rng.integers(0, 18, n).tolist() for n in lengths])
    ratings = pl.DataFrame({"person": rng.integers(0, 943, rows), "genres": genres})
    ratings = ratings.with_columns(click=pl.Series(rng.integers(0, 2, rows)))
    columns = dict(categorical=["person"], multi_hot=["genres"], label="click")
    data = dlrm_utils.preprocess_table(ratings, folder / "bags", **columns, progress=False)
    encoder = dlrm_utils.FrameEncoder(**columns).fit(ratings[: len(data.train)])
    batch, whole = encoder.transform(ratings), data.batch(range(rows))
    equal = all(
        np.array_equal(one, other)
        for part in ("indices", "offsets")
        for one, other in zip(getattr(batch, part), getattr(whole, part))
    )
    for size in (256, 2048):
        speed = len(data.train) / seconds_of(
            lambda size=size: [*dlrm_utils.shuffled_batches(data.batch, data.train, size)]
        )
        print(f"{rows:,} bags, as in a frame: {equal}; batches of {size}: {speed:,.0f} rows/s")


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--raw", type=Path)
    o = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        for rows in o.rows or [1_000_000, 3_000_000, 10_000_000]:
            measure(Path(folder), rows, o.beside, o.raw and o.raw.absolute())
        if not o.rows:
            killed(Path(folder))
            bags(Path(folder))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
