"""Preprocessing under stress: killed at random moments, out of disk, twice at once, packed input; and the shuffle."""
import gzip
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import dlrm_utils
from notebook_definitions import ROOT
from dlrm_utils import CriteoFormatError, preprocess_criteo, shuffled_rows, write_toy_criteo

ROWS = 120_000


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("preprocessing") / "toy.txt"
    write_toy_criteo(path, ROWS)
    return path


@pytest.fixture(scope="module")
def reference(raw):
    """The bytes of the file that an undisturbed run makes, and the seconds it takes as a process of its own."""
    start = time.perf_counter()
    assert command(raw, raw.with_name("reference.npz")).wait() == 0
    return raw.with_name("reference.npz").read_bytes(), time.perf_counter() - start


def command(raw, processed):
    arguments = [sys.executable, str(ROOT / "dlrm_utils.py"), "preprocess", str(raw), str(processed)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.skipif(os.name == "nt", reason="kill -9 and Ctrl-C by signal")
@pytest.mark.parametrize("attempt", range(6))
def test_killed_and_run_again_it_makes_the_same_bytes(raw, reference, tmp_path, attempt):
    expected, seconds = reference
    rng = random.Random(attempt)
    kind = [signal.SIGKILL, signal.SIGINT][attempt % 2]
    for _ in range(3):
        process = command(raw, tmp_path / "p.npz")
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        process.send_signal(kind)
        process.wait()
        assert not (tmp_path / "p.npz").exists() or (tmp_path / "p.npz").read_bytes() == expected
    assert command(raw, tmp_path / "p.npz").wait() == 0
    assert (tmp_path / "p.npz").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


@pytest.mark.parametrize("stage", ["_parse_piece", "_rank_codes", "_encode_piece"])
def test_stopped_in_each_stage_it_goes_on_from_the_finished_blocks(raw, reference, tmp_path, monkeypatch, stage):
    calls = []
    original = getattr(dlrm_utils, stage)

    def stops_once(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(dlrm_utils, stage, stops_once)
    with pytest.raises(KeyboardInterrupt):
        preprocess_criteo(raw, tmp_path / "p.npz", progress=False)
    monkeypatch.setattr(dlrm_utils, stage, original)
    assert not (tmp_path / "p.npz").exists()
    finished = sorted(path.name for path in (tmp_path / "p.npz.blocks").glob("block_?"))
    assert stage == "_parse_piece" or len(finished) == 7
    parsed = []
    parse = dlrm_utils._parse_piece
    monkeypatch.setattr(dlrm_utils, "_parse_piece", lambda *a: parsed.append(a[5]) or parse(*a))
    preprocess_criteo(raw, tmp_path / "p.npz", progress=False)
    assert (tmp_path / "p.npz").read_bytes() == reference[0]
    assert sum(parsed) == (0 if len(finished) == 7 else sum(np.diff(dlrm_utils._block_offsets(ROWS))[len(finished):]))


def test_blocks_of_another_raw_file_are_not_used(raw, tmp_path, monkeypatch):
    write_toy_criteo(tmp_path / "other.txt", ROWS, seed=9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dlrm_utils, "_rank_codes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        preprocess_criteo(tmp_path / "other.txt", tmp_path / "p.npz", progress=False)
    preprocess_criteo(raw, tmp_path / "p.npz", progress=False)
    assert (tmp_path / "p.npz").read_bytes() == preprocess_criteo(raw, tmp_path / "q.npz", progress=False).path.read_bytes()


def test_a_full_disk_is_said_and_leaves_no_half_file(raw, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dlrm_utils, "_write_npz", full)
        with pytest.raises(OSError, match="the disk is full.*run this again"):
            preprocess_criteo(raw, tmp_path / "p.npz", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz.blocks"]
    assert len(preprocess_criteo(raw, tmp_path / "p.npz", progress=False)) == ROWS


def test_a_second_process_is_told_to_wait(raw, tmp_path):
    (tmp_path / "p.npz.blocks").mkdir()
    with FileLock(tmp_path / "p.npz.blocks/lock"):
        process = command(raw, tmp_path / "p.npz")
        assert process.wait() == 1 and b"another process is making" in process.stderr.read()
    assert command(raw, tmp_path / "p.npz").wait() == 0


def test_two_started_together_leave_one_right_file(raw, reference, tmp_path):
    processes = [command(raw, tmp_path / "p.npz") for _ in range(2)]
    codes = [process.wait() for process in processes]
    assert 0 in codes and (tmp_path / "p.npz").read_bytes() == reference[0]


@pytest.mark.parametrize("packed", ["train.txt.gz", "dac.tar.gz", "dac.tgz"])
def test_packed_input_gives_the_same_rows(raw, tmp_path, packed):
    if packed == "train.txt.gz":
        with gzip.open(tmp_path / packed, "wb", compresslevel=1) as file:
            file.write(raw.read_bytes())
    else:
        (tmp_path / "readme.txt").write_text("no data")
        with tarfile.open(tmp_path / packed, "w:gz", compresslevel=1) as archive:
            archive.add(tmp_path / "readme.txt", "dac/readme.txt")
            archive.add(raw, "dac/train.txt")
    data = preprocess_criteo(tmp_path / packed, tmp_path / "p.npz", progress=False)
    plain = preprocess_criteo(raw, tmp_path / "plain.npz", progress=False)
    assert all(np.array_equal(getattr(data, name), getattr(plain, name)) for name in ("labels", "dense", "sparse"))
    assert not (tmp_path / "p.npz.blocks").exists()


def test_an_archive_without_train_txt_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("no data")
    with tarfile.open(tmp_path / "dac.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "readme.txt", "readme.txt")
    with pytest.raises(CriteoFormatError, match="holds no train.txt"):
        preprocess_criteo(tmp_path / "dac.tar.gz", tmp_path / "p.npz", progress=False)


@pytest.mark.parametrize("length", [300, 777, 4096, 100_000])
def test_pieces_of_any_length_give_the_same_rows(tmp_path, monkeypatch, length):
    write_toy_criteo(tmp_path / "toy.txt", 300)
    whole = preprocess_criteo(tmp_path / "toy.txt", tmp_path / "whole.npz", progress=False)
    index = dlrm_utils._line_index
    monkeypatch.setattr(dlrm_utils, "_line_index", lambda *a: index(*a, length=length))
    cut = preprocess_criteo(tmp_path / "toy.txt", tmp_path / "cut.npz", progress=False)
    assert whole.path.read_bytes() == cut.path.read_bytes()


def test_a_file_without_any_newline_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_bytes(b"1" * 10_000)
    index = dlrm_utils._line_index
    monkeypatch.setattr(dlrm_utils, "_line_index", lambda *a: index(*a, length=1_000))
    with pytest.raises(CriteoFormatError, match="line 1, column 1: a line of more than 4,000 bytes"):
        preprocess_criteo(tmp_path / "long.txt", tmp_path / "p.npz", progress=False)


@settings(deadline=None, max_examples=1_000)
@given(st.lists(st.sampled_from("0 1 9 - \t a f F g \0 \r . é".split(" ") + ["\t", "12345678", "deadBEEF", "2147483647", "2147483648"]), max_size=12),
       st.integers(0, 39))
def test_the_fast_parser_and_the_slow_one_agree_on_any_line(pieces, place):
    fields = ["1"] + ["7"] * 13 + ["0000abcd"] * 26
    fields[place] = "".join(pieces)
    line = "\t".join(fields).encode("latin-1")
    try:
        slow = dlrm_utils._parse_lines([line.decode("ascii", "replace")], "x", 1)
    except CriteoFormatError:
        slow = None
    buffer = np.frombuffer(line + b"\n" + bytes(64), np.uint8)
    arrays = (np.empty(1, np.uint8), np.empty((1, 13), np.int32), np.empty((26, 1), np.uint32), np.empty(1, np.uint32))
    parsed = dlrm_utils._parse_text(buffer, *arrays)
    assert parsed == (slow is not None)
    if slow is not None:
        codes = [-1 if arrays[3][0] >> j & 1 else int(arrays[2][j, 0]) for j in range(26)]
        assert arrays[0].tolist() == slow[0].tolist() and arrays[1].tolist() == slow[1].tolist() and codes == slow[2][0].tolist()


@given(st.integers(0, 5_000), st.integers(1, 50), st.integers(1, 20))
def test_the_shuffle_is_a_permutation_of_the_rows(rows, run, runs_at_once):
    order = shuffled_rows(range(10, 10 + rows), 0, run, runs_at_once)
    assert sorted(order.tolist()) == list(range(10, 10 + rows))
    for start in range(0, rows, run * runs_at_once):                             # few runs at a time, each of them whole
        together = order[start:start + run * runs_at_once]
        assert len(set((together - 10) // run)) <= runs_at_once + 1


def test_the_shuffle_mixes_even_a_sorted_file():
    labels = np.arange(1_000_000) >= 744_000                                     # all clicks at the end
    order = shuffled_rows(range(len(labels)), 0)
    shares = labels[order][:len(order) // 256 * 256].reshape(-1, 256).mean(1)    # of batches of 256
    by_chance = np.sqrt(0.256 * 0.744 / 256)
    assert shares.std() < 2 * by_chance and not np.array_equal(order, shuffled_rows(range(len(labels)), 1))
