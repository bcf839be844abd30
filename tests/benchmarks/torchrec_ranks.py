"""dlrm_torchrec.py: losses of 1, 2 and 4 processes against the notebook's single-process model, what a lost process costs, speed with 1 and 2
processes, and plans for 8, 64 and 1024 GPUs."""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_torchrec import (ENVIRONMENT, KEEP_LOSSES, ROOT, launch, lose_a_rank, mean_losses, notebook_losses, options, preprocess_criteo,
                           torchrun, write_toy_criteo)


def differences(folder, processed):
    """Largest difference of a loss over 20 steps, for each number of ranks, way of splitting and optimizer."""
    for sharding in ("table-wise", "row-wise"):
        for optimizer in ("sgd", "row-wise-adagrad"):
            for ranks in (1, 2, 4):
                run = folder / f"{sharding}-{optimizer}-{ranks}"
                command = options(processed, run, sharding=sharding, optimizer=optimizer, stop=20)
                launch(folder, KEEP_LOSSES, ranks, folder / "losses", *command)
                expected, _ = notebook_losses(processed, run / "start.pt", optimizer, 20)
                difference = np.abs(mean_losses(folder / "losses", ranks) - expected).max()
                print(f"{sharding}, {optimizer}, {ranks} ranks: largest difference of 20 losses {difference:.1e}", flush=True)


def lost_rank(folder, processed):
    """A process killed in mid-epoch: what the user sees, and the last evaluation of the resumed run beside that of an uninterrupted one."""
    whole, broken = (torchrun(2, ROOT / "dlrm_torchrec.py", *options(processed, folder / name, every=10)) for name in ("whole", "broken"))
    seen = lose_a_rank(broken, folder / "broken/last.pt")
    print(next(line for line in seen.splitlines() if "another process is gone" in line))
    for name, command in (("uninterrupted", whole), ("killed and resumed", broken)):
        result = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        lines = [line for line in result.stdout.splitlines() if line.startswith(("going on", "step"))]
        print(f"{name}: {lines[0]} ... {lines[-1]}", flush=True)


def speeds(folder, processed):
    """Rows a second with the paper's layers and batches of 2048, one core a process."""
    for ranks in (1, 2, 1, 2):
        command = [processed, "--checkpoints", folder / f"speed{ranks}", "--stop", "150", "--every", "100000"]
        result = subprocess.run(torchrun(ranks, ROOT / "dlrm_torchrec.py", *command), env=ENVIRONMENT, check=True, capture_output=True, text=True)
        print(result.stdout.strip().splitlines()[-1], flush=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for rows in (20_000, 500_000):
            write_toy_criteo(folder / f"{rows}.txt", rows)
            preprocess_criteo(folder / f"{rows}.txt", folder / f"{rows}.npz", min_count=5)
        differences(folder, folder / "20000.npz")
        lost_rank(folder, folder / "20000.npz")
        speeds(folder, folder / "500000.npz")
    for gpus in (8, 64, 1024):
        plan = subprocess.run([sys.executable, ROOT / "dlrm_torchrec.py", "--plan-only", str(gpus)], env=ENVIRONMENT, capture_output=True, text=True)
        print(re.sub(r" \(t0.*?\)", "", plan.stdout + plan.stderr).strip(), flush=True)


if __name__ == "__main__":
    main()
