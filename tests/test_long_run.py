"""A long training that is killed again and again ends at the same bits as one that is not."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import notebook_definitions
from dlrm_utils import load_criteo, preprocess_criteo, write_toy_criteo

book = notebook_definitions.load()
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_long_run import run
run(sys.argv[2], sys.argv[3])
"""
torch.sparse.check_sparse_tensor_invariants.disable()


def run(processed, folder, batch_size=64, stop=None):
    """The training that gets killed: two epochs, a checkpoint every 25 steps."""
    data = load_criteo(processed)
    torch.manual_seed(0)
    model = book.StackedDLRM(data.table_sizes, 8, [16], [16])
    optimizer = book.RowAdagrad(model.parameters(), lr=0.02)
    history = book.train_long(model, optimizer, data, batch_size, folder, every=25, num_epochs=2, stop=stop)
    return model, history


def saved_at(folder):
    """When the last checkpoint was written, or None."""
    path = Path(folder) / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def killed_runs(processed, folder, kills, seed):
    """Start the training in a process of its own, kill it within one to six checkpoints, and so on; at last let it finish.

    Returns how many were killed before the end.
    """
    chance, before_the_end = random.Random(seed), 0
    command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), str(processed), str(folder)]
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        saves, last = chance.randint(1, 6), saved_at(folder)
        while saves and process.poll() is None:
            time.sleep(0.002)
            if saved_at(folder) != last:
                saves, last = saves - 1, saved_at(folder)
        time.sleep(chance.uniform(0, 0.1))
        before_the_end += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return before_the_end


def same_bits(one, other):
    """Are the two checkpoints equal in weights, optimizer state and history?"""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    sums = [[state["sum"] for state in saved["optimizer"]["state"].values()] for saved in (one, other)]
    pairs = [*zip(one["model"].values(), other["model"].values(), strict=True), *zip(*sums, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs) and one["history"] == other["history"] and one["step"] == other["step"]


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    raw = tmp_path_factory.mktemp("long") / "toy.txt"
    write_toy_criteo(raw, 60_000)
    preprocess_criteo(raw, raw.with_suffix(".npz"), min_count=5, progress=False)
    return raw.with_suffix(".npz")


def test_three_kills_change_nothing(processed, tmp_path):
    run(processed, tmp_path / "whole")
    assert killed_runs(processed, tmp_path / "killed", kills=3, seed=0) == 3
    for name in ("last.pt", "best.pt"):
        assert same_bits(tmp_path / "whole" / name, tmp_path / "killed" / name)


def test_stopped_anywhere_it_resumes_from_the_last_checkpoint(processed, tmp_path):
    whole, history = run(processed, tmp_path / "whole", batch_size=1000)
    steps = 2 * -(-len(load_criteo(processed).train) // 1000)
    assert [step for step, _ in history] == [*range(25, steps, 25), steps]
    for stop in (3, 30, 75):
        run(processed, tmp_path / "parts", batch_size=1000, stop=stop)
    resumed, again = run(processed, tmp_path / "parts", batch_size=1000)
    assert again == history and all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    finished, again = run(processed, tmp_path / "parts", batch_size=1000)            # nothing is left to do
    assert again == history and all(map(torch.equal, whole.state_dict().values(), finished.state_dict().values()))


def test_the_best_checkpoint_is_kept_apart(processed, tmp_path):
    _, history = run(processed, tmp_path, batch_size=1000)
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert last["step"] == history[-1][0]
    assert [best["step"], min(loss for _, loss in history)] == min(history, key=lambda entry: entry[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_other_settings_are_refused(processed, tmp_path):
    run(processed, tmp_path, batch_size=1000, stop=25)
    with pytest.raises(ValueError, match="last.pt was made with the settings .*'batch_size': 1000.* not with .*'batch_size': 500"):
        run(processed, tmp_path, batch_size=500)
