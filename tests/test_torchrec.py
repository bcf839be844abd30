"""dlrm_torchrec.py against the notebook's single-process model: the same losses and weights on any number of ranks, and what a lost rank costs."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import notebook_definitions
from dlrm_utils import Batch, load_criteo, preprocess_criteo, to_keyed_jagged, to_offsets, write_toy_criteo
from notebook_definitions import ROOT

pytest.importorskip("torchrec")                                  # there are builds for Linux only
book = notebook_definitions.load()
LAYERS, BATCH_SIZE, RATE = ([16], [16]), 240, 0.05
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
torch.sparse.check_sparse_tensor_invariants.disable()

KEEP_LOSSES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import dlrm_torchrec
losses, history = dlrm_torchrec.main(sys.argv[3:])
json.dump(losses, open(f"{sys.argv[2]}.{os.environ['RANK']}", "w"))
"""
LOAD_AND_SAVE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import dlrm_torchrec as program
arguments = program.parsed(sys.argv[4:])
program.dist.init_process_group("gloo")
data = program.dlrm_utils.load_criteo(arguments.processed)
model, optimizers = program.sharded_model(program.notebook_definitions.load(), data.table_sizes, arguments, torch.device("cpu"))
checkpoint = program.load(sys.argv[2], model, optimizers)
program.save(sys.argv[3], model, optimizers, step=checkpoint["step"])
"""


def torchrun(ranks, script, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script), *map(str, arguments)]


def launch(folder, text, ranks, *arguments):
    """Run a small program on several ranks, to its end."""
    script = folder / "worker.py"
    script.write_text(text)
    result = subprocess.run(torchrun(ranks, script, ROOT, *arguments), env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def options(processed, folder, **more):
    """The command line of a small training."""
    flags = dict(checkpoints=folder, batch_size=BATCH_SIZE, learning_rate=RATE, bottom=16, top=16, width=8, every=20) | more
    return [processed, *[part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]]


def notebook_losses(processed, weights, optimizer, steps):
    """The same training by the notebook's stacked model in this process; its losses and the model."""
    data = load_criteo(processed)
    model = book.StackedDLRM(data.table_sizes, 8, *LAYERS)
    model.load_state_dict(book.stacked_state(torch.load(weights, weights_only=True)["model"]))
    optimizer = {"sgd": book.RowSGD, "row-wise-adagrad": book.RowAdagrad}[optimizer](model.parameters(), lr=RATE)
    rows = data.train[:len(data.train) // BATCH_SIZE * BATCH_SIZE]
    return book.train(model, data.batch, rows, optimizer, BATCH_SIZE, stop=steps), model


def lose_a_rank(command, checkpoint):
    """Start a training, kill one of its processes once there is a checkpoint; what the user sees then."""
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not checkpoint.exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    seen, _ = process.communicate(timeout=60)
    assert process.returncode != 0, seen[-3000:]
    return seen


def mean_losses(path, ranks):
    return np.mean([json.loads((path.parent / f"{path.name}.{rank}").read_text()) for rank in range(ranks)], axis=0)


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    raw = tmp_path_factory.mktemp("torchrec") / "toy.txt"
    write_toy_criteo(raw, 20_000)
    preprocess_criteo(raw, raw.with_suffix(".npz"), min_count=5, progress=False)
    return raw.with_suffix(".npz")


def test_keyed_jagged_counts_lengths():
    bags = [[[1, 2], [], [3]], [[0], [4, 4, 4], []]]
    indices, offsets = zip(*map(to_offsets, bags))
    keyed = to_keyed_jagged(Batch(torch.zeros(3, 1), list(indices), list(offsets), None))
    for t, column in enumerate(bags):
        part = keyed[f"t{t}"]
        assert [bag.tolist() for bag in part.to_dense()] == column and part.lengths().tolist() == [len(bag) for bag in column]


@pytest.mark.parametrize("ranks, sharding, optimizer", [(2, "table-wise", "row-wise-adagrad"), (2, "row-wise", "sgd"), (4, "row-wise", "row-wise-adagrad")])
def test_losses_equal_the_notebooks(processed, tmp_path, ranks, sharding, optimizer):
    command = options(processed, tmp_path / "run", sharding=sharding, optimizer=optimizer, stop=20)
    launch(tmp_path, KEEP_LOSSES, ranks, tmp_path / "losses", *command)
    expected, model = notebook_losses(processed, tmp_path / "run/start.pt", optimizer, 20)
    assert np.allclose(mean_losses(tmp_path / "losses", ranks), expected, atol=1e-5)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    for name, weight in book.unstacked_state(model.state_dict(), load_criteo(processed).table_sizes).items():
        assert torch.allclose(weight, state[name], atol=1e-4), name


def test_a_checkpoint_goes_round(processed, tmp_path):
    """Notebook to two ranks to four ranks to notebook, by other shardings: every weight and every sum of squares as before."""
    data = load_criteo(processed)
    torch.manual_seed(0)
    model = book.DLRM(data.table_sizes, 8, *LAYERS)
    names = [name for name, _ in model.named_parameters()]
    sums = {name: torch.rand(weight.shape[:1] if name.startswith("tables.") else weight.shape) for name, weight in model.state_dict().items()}
    torch.save(dict(model=model.state_dict(), sums=sums, step=7), tmp_path / "notebook.pt")
    command = options(processed, tmp_path)
    launch(tmp_path, LOAD_AND_SAVE, 2, tmp_path / "notebook.pt", tmp_path / "two.pt", *command, "--sharding", "table-wise")
    launch(tmp_path, LOAD_AND_SAVE, 4, tmp_path / "two.pt", tmp_path / "four.pt", *command, "--sharding", "row-wise")
    result = torch.load(tmp_path / "four.pt", weights_only=True)
    again = book.DLRM(data.table_sizes, 8, *LAYERS)
    again.load_state_dict(result["model"])
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values())) and result["step"] == 7
    assert sorted(result["sums"]) == sorted(names) and all(torch.equal(sums[name], result["sums"][name]) for name in names)


def test_a_lost_rank_ends_all_and_the_rest_is_made_up_for(processed, tmp_path):
    whole, broken = (options(processed, tmp_path / name, every=10) for name in ("whole", "broken"))
    subprocess.run(torchrun(2, ROOT / "dlrm_torchrec.py", *whole), env=ENVIRONMENT, check=True, capture_output=True)
    seen = lose_a_rank(torchrun(2, ROOT / "dlrm_torchrec.py", *broken), tmp_path / "broken/last.pt")
    assert "another process is gone; the same command, started again, goes on" in seen, seen[-3000:]
    step = torch.load(tmp_path / "broken/last.pt", weights_only=True)["step"]
    result = subprocess.run(torchrun(2, ROOT / "dlrm_torchrec.py", *broken), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert f"going on from step {step}" in result.stdout
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "broken"))
    assert one["step"] == other["step"] and np.allclose(one["history"], other["history"], atol=1e-6)
    assert all(torch.allclose(one["model"][name], other["model"][name], atol=1e-5) for name in one["model"])


def test_wrong_use_is_told_plainly(processed, tmp_path):
    launch(tmp_path, KEEP_LOSSES, 1, tmp_path / "losses", *options(processed, tmp_path / "run", stop=1, every=1))
    refused = subprocess.run(torchrun(1, ROOT / "dlrm_torchrec.py", *options(processed, tmp_path / "run", learning_rate=0.5)),
                             env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode != 0 and "use those, or another folder" in refused.stderr
    none = subprocess.run([sys.executable, ROOT / "dlrm_torchrec.py"], env=ENVIRONMENT, capture_output=True, text=True)
    assert none.returncode != 0 and "name the processed Criteo file" in none.stderr


def test_the_plan_for_a_cluster_that_is_not_there():
    plan = lambda gpus: subprocess.run([sys.executable, ROOT / "dlrm_torchrec.py", "--plan-only", str(gpus)], env=ENVIRONMENT, capture_output=True, text=True)
    eight, one = plan(8), plan(1)
    fullest, emptiest = map(float, re.search(r"fullest GPU ([\d.]+) GiB, on the emptiest ([\d.]+) GiB", eight.stdout).groups())
    assert eight.returncode == 0 and 97.4 / 8 <= fullest < 80 and emptiest <= 97.4 / 8
    assert one.returncode != 0 and "It does not fit" in one.stderr
