"""dlrm_torchrec.py against the notebook's model in one process: losses, checkpoints, bad input.

Most processes are forks of one that has imported TorchRec; those of torchrun take 10 s to start.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from data.toy_clicks import write_toy_criteo
from dlrm_utils import (
    Batch,
    FrameEncoder,
    load_criteo,
    preprocess_criteo,
    preprocess_table,
    to_offsets,
)
from test_stacked import unstacked_state

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # a minute together: TorchRec alone takes 7 s to import
LAYERS, BATCH_SIZE, RATE = ([16], [16]), 240, 0.05
PATIENCE = 600  # seconds after which a process is taken to hang; a busy machine needs over 60


def options(processed, folder, **more):
    """The command line of a small training."""
    flags = dict(checkpoints=folder, batch_size=BATCH_SIZE, learning_rate=RATE)
    flags |= dict(bottom=16, top=16, width=8, every=20) | more
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return [str(processed), *[part for pair in pairs for part in pair]]


@pytest.fixture(scope="module")
def program():
    # There are builds for Linux only.
    return pytest.importorskip("dlrm_torchrec", exc_type=ImportError)


@pytest.fixture(scope="module")
def launch(program, tmp_path_factory):
    """launch(job, ranks, *arguments): exit codes, stdout and stderr of each rank."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["torchrec_worker"])
    with pytest.MonkeyPatch.context() as patch:  # what the server, and so every rank, starts with
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forks.Process(target=int).start()
    import torchrec_worker as worker

    def launch(job, ranks, *arguments):
        output = tmp_path_factory.mktemp("output")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        texts, processes = [str(argument) for argument in arguments], []
        for rank in range(ranks):
            shared = (getattr(worker, job), rank, ranks, port, output, texts)
            processes.append(forks.Process(target=worker.start, args=shared))
            processes[-1].start()
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode is not None, f"a rank hangs in {job} {texts}"
        read = [
            [(output / f"{name}.{rank}").read_text() for rank in range(ranks)]
            for name in ("stdout", "stderr")
        ]
        return [process.exitcode for process in processes], *read

    return launch


@pytest.fixture
def succeed(launch):
    """Like launch; stdout of rank 0, and nothing may go wrong."""

    def succeed(*arguments):
        codes, stdout, stderr = launch(*arguments)
        assert not any(codes), "\n".join(stderr)[-3000:]
        return stdout[0]

    return succeed


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    raw = tmp_path_factory.mktemp("torchrec") / "toy.txt"
    write_toy_criteo(raw, 20_000)
    preprocess_criteo(raw, raw.with_suffix(""), min_count=5, progress=False)
    return raw.with_suffix("")


def test_keyed_jagged_counts_lengths(program):
    bags = [[[1, 2], [], [3]], [[0], [4, 4, 4], []]]
    indices, offsets = zip(*map(to_offsets, bags), strict=True)
    batch = Batch(torch.zeros(3, 1), list(indices), list(offsets), torch.ones(3))
    keyed = program.keyed(batch)
    for t, column in enumerate(bags):
        part = keyed.indices[f"t{t}"]
        assert [bag.tolist() for bag in part.to_dense()] == column
        assert part.lengths().tolist() == [len(bag) for bag in column]
    assert not isinstance(keyed, Batch)  # that one's checks are for offsets
    assert torch.equal(keyed.to("cpu").dense, batch.dense) and keyed.labels is batch.labels


def test_without_torchrec_the_import_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    monkeypatch.setitem(sys.modules, "fbgemm_gpu.split_embedding_configs", None)
    monkeypatch.delitem(sys.modules, "dlrm_torchrec", raising=False)
    with pytest.raises(
        ImportError,
        match="no fbgemm_gpu.*: install requirements-torchrec.txt",
    ):
        importlib.import_module("dlrm_torchrec")


CASES = [
    (2, "table-wise", "row-wise-adagrad"),
    (2, "row-wise", "sgd"),
    (4, "row-wise", "row-wise-adagrad"),
    (4, "table-row-wise", "row-wise-adagrad"),
]


@pytest.mark.parametrize("ranks, sharding, optimizer", CASES)
def test_losses_equal_the_notebooks(
    program, succeed, notebook, processed, tmp_path, ranks, sharding, optimizer
):
    command = options(processed, tmp_path, sharding=sharding, optimizer=optimizer, stop=20)
    losses = json.loads(succeed("train", ranks, *command).splitlines()[-1])
    data = load_criteo(processed)
    model = notebook.DLRM(data.table_sizes, 8, *LAYERS)
    model.load_state_dict(program.to_notebook(tmp_path / "step-000000000"))
    model.tables = notebook.StackedTables(model.tables)
    kind = {"sgd": torch.optim.SGD, "row-wise-adagrad": notebook.RowAdagrad}[optimizer]
    rows = data.train[: len(data.train) // BATCH_SIZE * BATCH_SIZE]
    own = kind(model.parameters(), lr=RATE)
    expected = notebook.train(model, data.batch, rows, own, BATCH_SIZE, stop=20)
    assert len(losses) == 20 and np.allclose(losses, expected, atol=1e-5)
    state = program.to_notebook(tmp_path / "step-000000020")
    for name, weight in unstacked_state(model.state_dict(), data.table_sizes).items():
        assert torch.allclose(weight, state[name], atol=1e-4), name


def test_a_checkpoint_goes_round(program, succeed, notebook, processed, tmp_path):
    """From the notebook through five ways to share the tables: every bit as before."""
    torch.manual_seed(0)
    model = notebook.DLRM(load_criteo(processed).table_sizes, 8, *LAYERS)
    weights, sums = model.state_dict(), {}
    for name, weight in weights.items():
        sums[name] = torch.rand(weight.shape[:1] if name.startswith("tables.") else weight.shape)
    source = tmp_path / "notebook"
    program.from_notebook(source, weights, sums)
    chain = [(2, "table-wise"), (4, "row-wise"), (1, "row-wise"), (2, "row-wise")]
    for place, (ranks, sharding) in enumerate([*chain, (4, "table-wise")]):
        folder = tmp_path / str(place)
        command = options(processed, folder, sharding=sharding)
        succeed("pass_on", ranks, source, folder, *command)
        source = folder / "step-000000007"
        weights_now, sums_now = (program.to_notebook(source, kind) for kind in (False, True))
        assert weights_now.keys() == weights.keys() and sums_now.keys() == sums.keys()
        assert all(torch.equal(weights[name], weights_now[name]) for name in weights)
        assert all(torch.equal(sums[name], sums_now[name]) for name in sums)
    model.load_state_dict(weights_now)
    command = options(processed, tmp_path / "start", weights=tmp_path / "notebook", stop=1)
    succeed("train", 2, *command)
    started = program.to_notebook(tmp_path / "start/step-000000000")
    assert all(torch.equal(weights[name], started[name]) for name in weights)


MOMENTS = [("unwritten", 20), ("written", 20), ("renamed", 40)]


@pytest.mark.parametrize("moment, last", MOMENTS)
def test_a_kill_while_saving_costs_nothing_saved(
    program, launch, succeed, processed, tmp_path, moment, last
):
    command = options(processed, tmp_path)
    codes, _, stderr = launch("train_and_die", 2, moment, 40, *command)
    assert -signal.SIGKILL in codes and 0 not in codes
    assert "a process is gone or was stopped; the same command goes on" in "".join(stderr)
    assert program.newest(tmp_path).name == f"step-{last:09}"
    kept = {path.name for path in tmp_path.iterdir()}
    assert {f"step-{last - 20:09}", f"step-{last:09}"} <= kept
    more = options(processed, tmp_path, stop=50)
    assert f"starting from step {last} of" in succeed("train", 1, *more)
    steps = {"step-000000040", "step-000000050"}
    assert {path.name for path in tmp_path.iterdir()} == steps


def lines_of(launch, command_lines):
    """What each of several wrong command lines ends with, on both ranks."""
    codes, stdout, stderr = launch("refusals", 2, *map(json.dumps, command_lines))
    assert not any(codes), "\n".join(stderr)[-3000:]
    ends = [
        json.loads("[" + ",".join(re.findall("^end: (.*)$", text, re.M)) + "]") for text in stdout
    ]
    return list(zip(*ends, strict=True))


def test_wrong_use_is_told_by_one_rank_and_ends_all(program, launch, succeed, processed, tmp_path):
    good = tmp_path / "good"
    succeed("train", 2, *options(processed, good, stop=20))
    write_toy_criteo(tmp_path / "other.txt", 20_000, seed=1)
    preprocess_criteo(tmp_path / "other.txt", tmp_path / "processed1", 5, progress=False)
    (tmp_path / "processed0").symlink_to(processed)
    (tmp_path / "gone0").symlink_to(processed)
    for name in ("half", "part", "nobody"):
        shutil.copytree(good, tmp_path / name)
    (shard, *_) = sorted((tmp_path / "half/step-000000020").glob("shard-00002*"))
    os.truncate(shard, shard.stat().st_size // 2)
    (shard, *_) = sorted((tmp_path / "part/step-000000020").glob("shard-00002*"))
    shard.unlink()
    (tmp_path / "nobody/step-000000020/about.json").unlink()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/last.pt").touch()
    (tmp_path / "seen0").symlink_to(good)
    wrong = {
        "rank 0: .*good.step-000000020 is of another model.*Size mismatch": options(
            processed, good, top=32
        ),
        "rank 0: .*it was made with .*'learning_rate': 0.05.*not with .*0.5": options(
            processed, good, learning_rate=0.5
        ),
        "rank 0: .*it was made with .*'relu_after_bottom': False.*not with .*True": [
            *options(processed, good),
            "--relu-after-bottom",
        ],
        "rank 0: .*step-000000020 cannot be used.*'relu_after_bottom': False.*with .*True": [
            *options(processed, tmp_path / "new", weights=good / "step-000000020"),
            "--relu-after-bottom",
        ],
        "rank 0: .*half.step-000000020 cannot be used; delete it": options(
            processed, tmp_path / "half"
        ),
        "rank 0: .*part.step-000000020 ": options(processed, tmp_path / "part"),
        "rank 0: .*nobody.step-000000020 cannot be used.*about.json": options(
            processed, tmp_path / "nobody"
        ),
        "rank 0: .*foreign holds last.pt, not checkpoints": options(
            processed, tmp_path / "foreign"
        ),
        "rank 0: data, checkpoints or options differ: .*step-000000020": options(
            processed, tmp_path / "seen{rank}"
        ),
        "rank 0: .*new0.saving; do all ranks share it": options(
            processed, tmp_path / "new{rank}", sharding="row-wise"
        ),
        "rank 1: there is no folder .*gone1": options(tmp_path / "gone{rank}", tmp_path / "new"),
        "rank 0: data, checkpoints or options differ: ": options(
            tmp_path / "processed{rank}", tmp_path / "new"
        ),
        "rank 0: --batch-size must be a multiple of 2, ": options(
            processed, tmp_path / "new", batch_size=241
        ),
        "rank 0: --batch-size must be .* at most 17143": options(
            processed, tmp_path / "new", batch_size=24000
        ),
    }
    for message, ends in zip(wrong, lines_of(launch, wrong.values()), strict=True):
        told = [end for end in ends if isinstance(end, str)]
        assert len(told) == 1 and re.match(message, told[0], re.DOTALL), (message, ends)
        assert "\n" not in told[0] and [end for end in ends if end != told[0]] == [1]
    assert not (tmp_path / "new").exists()


def test_more_ranks_than_rows_of_a_table(launch, processed, tmp_path):
    """As the processes end by themselves: exit codes, and one sentence in all."""
    ranks = min(load_criteo(processed).table_sizes) + 1
    command = options(processed, tmp_path / "run", sharding="row-wise", batch_size=ranks)
    codes, _, stderr = launch("train", ranks, *command)
    assert codes == [1] * ranks
    assert re.fullmatch(r"rank 0: a table has fewer rows than .*\n", "".join(stderr))


def test_the_command_line_is_read_by_rank_0(program, monkeypatch, capsys):
    wrong = {
        "": "name the processed folder",
        "x --every 0": "--every must be above 0, not 0",
        "x --learning-rate nan": "--learning-rate must be above 0, not nan",
        "x --learning-rate inf": "--learning-rate must be above 0, not inf",
        "x --learning-rate -1": "--learning-rate must be above 0, not -1.0",
        "x --batch-size 0": "--batch-size must be above 0, not 0",
        "x --epochs 0": "--epochs must be above 0",
        "x --stop -3": "--stop must be above 0",
        "x --width 0": "--width must be above 0",
        "x --bottom 16 0": "--bottom must be above 0, not [16, 0]",
        "--plan-only 0": "--plan-only must be above 0",
        "x --every 2.5": "argument --every: invalid int value: '2.5'",
    }
    for command_line, complaint in wrong.items():
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as end:
                program.parsed(command_line.split())
            told = capsys.readouterr().err
            assert end.value.code == 2 and told.count("\n") == (2 if rank == "0" else 0)
            assert complaint in told or rank == "1"


def table_of(text):
    """A printed plan: for each strategy ms, GiB on the fullest and emptiest GPU, empty GPUs."""
    rows = re.findall(r"^([a-z-]+) +([\d,.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    return {name: [float(part.replace(",", "")) for part in numbers] for name, *numbers in rows}


def test_plans_for_clusters_that_are_not_there(program, launch, succeed):
    mean = sum(program.TERABYTE_TABLE_SIZES) * 128 * 4 / 2**30 / 8
    text = succeed("plan", 1, "--plan-only", 8)
    eight = table_of(text)
    assert eight.keys() == program.STRATEGIES.keys()
    for ms, fullest, emptiest, empty in eight.values():
        assert ms > 0 and emptiest < mean + 0.01 and mean - 0.01 < fullest < 80 and empty == 0
    biggest = max(program.TERABYTE_TABLE_SIZES) * 128 * 4 / 2**30
    assert eight["table-wise"][1] >= biggest > eight["row-wise"][1]
    sixty_four = table_of(succeed("plan", 1, "--plan-only", 64))
    assert sixty_four["table-wise"][2:] == [0, 64 - 26]
    assert all(sixty_four[name][3] == 0 for name in program.STRATEGIES if name != "table-wise")
    fewer = table_of(succeed("plan", 1, "--plan-only", 8, "--batch-size", 512))
    assert all(fewer[name][0] < eight[name][0] for name in eight)
    codes, _, stderr = launch("plan", 1, "--plan-only", 1)
    assert codes == [1] and "It does not fit on 1 GPUs" in stderr[0]


def torchrun(logs, redirects, *arguments):
    """The command of two processes; some of them, by number, write to files under logs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--log-dir", logs, "--redirects", redirects]
    return [*map(str, command), str(ROOT / "dlrm_torchrec.py"), *arguments]


def log_of(logs, rank, stream):
    (path,) = logs.glob(f"*/attempt_0/{rank}/{stream}.log")
    return path.read_text()


def bars_in(text):
    return len(re.findall(r"training:.*step/s", text))


def told_in_terminal(command, environment, until):
    """Start a program in a terminal and kill its last child at `until()`; all that it showed."""
    import pty  # not on Windows, where there is no TorchRec either
    import termios

    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 100))  # (rows, columns)
    process = subprocess.Popen(command, env=environment, stdout=its_end, stderr=its_end)
    os.close(its_end)
    seen, killed = b"", False
    with contextlib.suppress(OSError):  # the end of what there is to read
        while True:
            seen += os.read(terminal, 100_000)
            if not killed and until(seen):
                children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
                os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
                killed = True
    os.close(terminal)
    return process.wait(PATIENCE), seen.decode()


WAITING = """import ctypes, os, signal, threading
import dlrm_torchrec
dlrm_torchrec.end_on_signals("told")
threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
library.pthread_mutex_lock(lock)
library.pthread_mutex_lock(lock)
"""


def test_a_signal_ends_a_rank_that_waits_outside_python(program):
    command = [sys.executable, "-c", WAITING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.endswith("told\n")


# Twice the start of torchrun, 10 s each: only so are a terminal, a log and a lost process real.
def test_one_bar_and_a_lost_process_under_torchrun(program, succeed, processed, tmp_path):
    """One of two processes is killed; resumed, the run ends where an unbroken one does."""
    environment = {name: os.environ[name] for name in os.environ if name != "TQDM_DISABLE"}
    environment["OMP_NUM_THREADS"] = "1"
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    succeed("train", 2, *options(processed, whole, every=40, epochs=4))
    command = options(processed, broken, every=40, epochs=4)
    first, second = (tmp_path / name for name in ("first", "second"))
    code, seen = told_in_terminal(
        torchrun(first, "1:3", *command),
        environment,
        until=lambda seen: b"training:" in seen and b"step 80 of" in seen,
    )
    assert code != 0, seen
    assert "a process is gone or was stopped; the same command goes on" in seen, seen
    assert bars_in(seen) and not bars_in(log_of(first, 1, "stderr"))
    step = int(program.newest(broken).name.removeprefix("step-"))
    again = torchrun(second, "3", *command)
    subprocess.run(again, env=environment, check=True, capture_output=True)
    assert f"starting from step {step} of" in log_of(second, 0, "stdout")
    assert bars_in(log_of(second, 0, "stderr")) and not bars_in(log_of(second, 1, "stderr"))
    assert not log_of(second, 1, "stdout")
    ends = [program.newest(folder) for folder in (whole, broken)]
    assert ends[0].name == ends[1].name
    one, other = (json.loads((end / "about.json").read_text())["history"] for end in ends)
    assert np.allclose(one, other, atol=1e-6)
    one, other = (program.to_notebook(end) for end in ends)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


# ---- Other folders, and the form of the bottom MLP ----


def test_the_published_form_trains_as_the_notebooks_and_its_checkpoint_says_so(
    program, succeed, notebook, processed, tmp_path
):
    command = [*options(processed, tmp_path, stop=20), "--relu-after-bottom"]
    losses = json.loads(succeed("train", 2, *command).splitlines()[-1])
    for name in ("step-000000000", "step-000000020"):
        with pytest.raises(ValueError, match="made with.*'relu_after_bottom': True"):
            program.to_notebook(tmp_path / name)
    first = program.to_notebook(tmp_path / "step-000000000", relu_after_bottom=True)
    data, expected = load_criteo(processed), {}
    rows = data.train[: len(data.train) // BATCH_SIZE * BATCH_SIZE]
    for published in (True, False):
        model = notebook.DLRM(data.table_sizes, 8, *LAYERS, relu_after_bottom=published)
        model.load_state_dict(first)
        own = notebook.RowAdagrad(model.parameters(), lr=RATE)
        expected[published] = notebook.train(model, data.batch, rows, own, BATCH_SIZE, stop=20)
    assert np.allclose(losses, expected[True], atol=1e-5)
    assert not np.allclose(losses, expected[False], atol=1e-3)


@pytest.fixture(scope="module")
def own_table(tmp_path_factory):
    """A folder of two numbers, three names and bags; 571 rows of validation."""
    folder, rng, rows = tmp_path_factory.mktemp("own"), np.random.default_rng(0), 7 * 1143 - 3
    frame = pl.DataFrame(
        {
            "age": rng.normal(size=rows),
            "visits": rng.integers(0, 50, rows),
            **{name: rng.integers(0, 20, rows).astype(str) for name in "abc"},
            "tags": [rng.integers(0, 9, k).astype(str).tolist() for k in rng.integers(0, 4, rows)],
        }
    ).with_columns(click=(pl.col("age") + pl.Series(rng.normal(size=rows)) > 0).cast(pl.Int8))
    encoder = FrameEncoder(["age"], list("abc"), ["tags"], "click", counts=["visits"])
    return preprocess_table(frame, folder / "data", encoder=encoder, progress=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_table_of_ones_own_is_trained_on_and_scored_to_its_last_row(
    program, succeed, notebook, own_table, tmp_path, ranks
):
    """Other numbers than 13, bags, and validation rows that two processes cannot share evenly."""
    assert len(own_table.validation) == 571
    told = succeed("train", ranks, *options(own_table.path, tmp_path, stop=20))
    losses, step = (
        json.loads(told.splitlines()[-1]),
        r"step 20 of .* log loss ([\d.]+), AUC ([\d.]+)",
    )
    model = notebook.DLRM(own_table.table_sizes, 8, *LAYERS, num_dense=2)
    model.load_state_dict(program.to_notebook(tmp_path / "step-000000000"))
    own = notebook.RowAdagrad(model.parameters(), lr=RATE)
    rows = own_table.train[: len(own_table.train) // BATCH_SIZE * BATCH_SIZE]
    expected = notebook.train(model, own_table.batch, rows, own, BATCH_SIZE, stop=20)
    assert np.allclose(losses, expected, atol=1e-5)
    scores = notebook.evaluate(model, own_table.batch(own_table.validation))
    found = [float(part) for part in re.search(step, told).groups()]
    assert np.allclose(found, [scores["log_loss"], scores["auc"]], atol=1e-4)
    one_less = notebook.evaluate(model, own_table.batch(own_table.validation[:-1]))
    about = json.loads((tmp_path / "step-000000020/about.json").read_text())
    gaps = [abs(about["history"][-1][1] - each["log_loss"]) for each in (scores, one_less)]
    assert gaps[0] < 1e-6 < gaps[1]


def test_a_table_without_label_or_names_is_refused(launch, own_table, tmp_path):
    frame = pl.DataFrame({"x": np.arange(70.0), "a": ["u", "v"] * 35, "y": [0, 1] * 35})
    folders = []
    for place, (names, label) in enumerate([(["a"], None), ([], "y")]):
        encoder = FrameEncoder(["x"], names, label=label)
        folders.append(tmp_path / str(place))
        preprocess_table(frame, folders[-1], encoder=encoder, progress=False)
    commands = [options(folder, tmp_path / "new", batch_size=2) for folder in folders]
    for ends in lines_of(launch, commands):
        told = [end for end in ends if isinstance(end, str)]
        assert len(told) == 1 and "lacks a label, categories, or validation rows" in told[0]
