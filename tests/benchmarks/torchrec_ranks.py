"""dlrm_torchrec.py: losses beside the notebook's, memory of a checkpoint, kills, speed, plans."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import dlrm_torchrec as program  # noqa: E402
import dlrm_utils  # noqa: E402
from data import toy_clicks  # noqa: E402
from test_torchrec import BATCH_SIZE, LAYERS, RATE, options  # noqa: E402

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def torchrun(ranks, *arguments, script=ROOT / "dlrm_torchrec.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", str(ranks), str(script), *map(str, arguments)]


def printed(command):
    """What a command prints to its end."""
    result = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return result.stdout


def differences(book, processed, folder):
    """The largest difference of a loss to the notebook's over 20 steps."""
    data = dlrm_utils.load_criteo(processed)
    rows = data.train[: len(data.train) // BATCH_SIZE * BATCH_SIZE]
    for sharding, optimizer in (("table-wise", "row-wise-adagrad"), ("row-wise", "sgd")):
        for ranks in (1, 2, 4):
            run = folder / f"{sharding}{ranks}"
            more = dict(sharding=sharding, optimizer=optimizer, stop=20)
            printed(torchrun(ranks, *options(processed, run, **more)))
            model = book.DLRM(data.table_sizes, 8, *LAYERS)
            model.load_state_dict(program.to_notebook(run / "step-000000000"))
            model.tables = book.StackedTables(model.tables)
            kind = torch.optim.SGD if optimizer == "sgd" else book.RowAdagrad
            own = kind(model.parameters(), lr=RATE)
            expected = book.train(model, data.batch, rows, own, BATCH_SIZE, stop=20)
            losses = json.loads((run / "losses.json").read_text())
            worst = np.abs(np.subtract(losses, expected)).max()
            print(f"{sharding}, {optimizer}, {ranks} ranks: losses within {worst:.1e}", flush=True)


def peak(action):
    """MiB of memory that this process needed beyond what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, _ = resident()
    action()
    return resident()[1] - before


def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "VmHWM")]


def memory_of_a_rank(folder):
    """Save and load two tables of 244 MiB; every rank prints what it needed for that."""
    arguments = program.parsed(["none", "--width", "128"])
    dist.init_process_group("gloo")
    book = dlrm_utils.load_notebook()
    model, optimizer = program.sharded_model(book, [500_000] * 2, arguments, torch.device("cpu"))
    state, about = program.state_of(model, optimizer), dict(step=1, settings={})
    saving = peak(lambda: program.save(folder, state, about))
    loading = peak(lambda: program.load(folder / "step-000000001", state))
    print(
        f"rank {dist.get_rank()}: {saving:.0f} MiB more to save, {loading:.0f} to load", flush=True
    )


def kills(processed, folder, times=3):
    """Kill one of two processes while a checkpoint is being written; what the next run does."""
    command = torchrun(2, *options(processed, folder, every=3))
    for number in range(times):
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=-2)
        first = program.newest(folder)
        while not (folder / "saving").exists() or program.newest(folder) == first:
            time.sleep(0.0005)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
        os.kill(int(children.stdout.split()[number % 2]), signal.SIGKILL)
        code = process.wait()
        left = sorted(path.name for path in folder.glob("s*"))
        print(f"killed while saving: exit code {code}, left {', '.join(left)}", flush=True)
    lines = printed(command).splitlines()
    print(f"the next run: {lines[0]} ... {lines[-2]}", flush=True)


def seconds(ranks, processed, folder, steps):
    run = folder / f"{ranks}-{time.time()}"
    text = printed(torchrun(ranks, processed, "--checkpoints", run, "--stop", steps))
    done, rate = re.search(r"([\d,]+) steps, ([\d,]+) rows/s", text).groups()
    return 2048 * int(done) / int(rate.replace(",", ""))


def speeds(processed, folder):
    """Rows a second with the paper's layers and batches of 2048, one core a process.

    The difference of a long and a short run is without the one evaluation and checkpoint of each.
    """
    for ranks in (1, 2, 1, 2):
        spent = seconds(ranks, processed, folder, 170) - seconds(ranks, processed, folder, 20)
        print(f"{ranks} processes: {150 * 2048 / spent:,.0f} rows/s", flush=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for rows in (20_000, 500_000):
            toy_clicks.write_toy_criteo(folder / f"{rows}.txt", rows)
            dlrm_utils.preprocess_criteo(folder / f"{rows}.txt", folder / f"{rows}", min_count=5)
        differences(dlrm_utils.load_notebook(), folder / "20000", folder)
        kills(folder / "20000", folder / "killed")
        print(printed(torchrun(2, folder / "memory", script=__file__)), end="", flush=True)
        speeds(folder / "500000", folder)
    for gpus in (8, 64, 1024):
        program.main(["--plan-only", str(gpus)])


if __name__ == "__main__":
    if "RANK" in os.environ:
        memory_of_a_rank(Path(sys.argv[1]))
    else:
        main()
