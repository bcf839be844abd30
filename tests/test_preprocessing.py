"""Preprocessing under stress: killed, out of disk, twice at once, packed, cut; and the shuffle."""

import collections
import errno
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dlrm_utils
from conftest import ROOT
from data import criteo, encoder, folder
from data import files as shared
from data.files import FormatError
from data.toy_clicks import write_toy_criteo
from dlrm_utils import preprocess_criteo, shuffled_rows

ROWS = 60_000


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("preprocessing") / "toy.txt"
    write_toy_criteo(path, ROWS)
    return path


@pytest.fixture(scope="module")
def reference(raw):
    """The files that an undisturbed run makes."""
    preprocess_criteo(raw, raw.with_name("reference"), progress=False)
    return files(raw.with_name("reference"))


def files(place):
    paths = [path for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): path.read_bytes() for path in paths}


def write_rows(path):
    """Rows of Criteo's form, written here: the toy's writer renames, too, but flushes nothing."""
    path.write_text(
        "".join(f"{k % 2}" + f"\t{k}" * 13 + f"\t{k:08x}" * 26 + "\n" for k in range(70))
    )


def command(raw, processed):
    arguments = [
        sys.executable,
        str(ROOT / "dlrm_utils.py"),
        "preprocess",
        str(raw),
        str(processed),
    ]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_in_a_stage(raw, processed, seconds, kind=signal.SIGKILL):
    """Start a run, wait until it has stages, and stop it so many seconds later."""
    process = command(raw, processed)
    stages = processed.with_name(f"{processed.name}.making") / folder.STAGES
    while not stages.exists():  # not before: the imports take longer than the stages
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(kind)
    process.wait()
    return stages.exists()


# Over five seconds: processes are really killed, and each one first imports PyTorch.
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 and Ctrl-C by signal")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again_it_makes_the_same_bytes(raw, reference, tmp_path, kind):
    met = []
    for seconds in (0.05, 0.2, 0.4):  # the stages of this file take half a second
        met.append(kill_in_a_stage(raw, tmp_path / "p", seconds, kind))
        if (tmp_path / "p").exists():
            break
    assert met[0]
    assert command(raw, tmp_path / "p").wait() == 0
    assert files(tmp_path / "p") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


DYING = """import os, sys
from data import files
replace = os.replace
files.os.replace = lambda *paths: os._exit(9) if paths[1].name == sys.argv[3] else replace(*paths)
import dlrm_utils
dlrm_utils.preprocess_criteo(sys.argv[1], sys.argv[2], progress=False)
"""


# Over five seconds: a process imports PyTorch and dies.
@pytest.mark.slow
@pytest.mark.parametrize("half_written", ["14-C1.csv", encoder.SETTINGS, "source.json"])
def test_what_was_half_written_at_a_kill_does_not_stay(raw, reference, tmp_path, half_written):
    paths = [str(raw), str(tmp_path / "p"), half_written]
    assert subprocess.run([sys.executable, "-c", DYING, *paths], cwd=ROOT).returncode == 9
    assert list(tmp_path.rglob(f".{half_written}.*"))
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert files(tmp_path / "p") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


STAGES = {  # what is called in each, and how often before it is stopped there
    "reading": (criteo, "parsed", 3),
    "numbering": (encoder, "write_names", 10),
    "writing": (folder.Part, "numbers", 1),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_a_stage_it_repeats_no_stage_before(
    raw, reference, tmp_path, monkeypatch, stage
):
    monkeypatch.setattr(shared, "PIECE", 1 << 20)
    calls = watched(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        calls.stop_after = stage
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["p.making"]
    done = len(list((tmp_path / "p.making" / folder.STAGES).glob("*/ids/*.json")))
    # Two tables are numbered at a time: some more than those that were let through are done.
    assert done in {"reading": [0], "numbering": range(8, 20), "writing": [26]}[stage]
    calls.clear()
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert files(tmp_path / "p") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert (calls["reading"] > 0) == (stage == "reading")
    assert calls["numbering"] == 26 - done


def watched(monkeypatch):
    """Counts the calls in each stage; stops those of `stop_after` after some."""
    calls = collections.Counter()
    calls.stop_after = None
    for stage, (place, name, most) in STAGES.items():
        original = getattr(place, name)

        def counted(*arguments, stage=stage, original=original, most=most):
            if calls.stop_after == stage and calls[stage] == most:
                calls.stop_after = None
                raise KeyboardInterrupt
            calls[stage] += 1
            return original(*arguments)

        monkeypatch.setattr(place, name, counted)
    return calls


def test_what_a_finished_run_left_is_removed(raw, reference, tmp_path):
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    (tmp_path / "p.making" / folder.STAGES / "parts").mkdir(parents=True)
    (tmp_path / "p.making" / folder.LOCK).touch()
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_what_is_not_ours_in_the_folder_of_stages_is_left(raw, reference, tmp_path):
    (tmp_path / "p.making").mkdir()
    (tmp_path / "p.making/lock").write_text("my own lock")
    before = files(tmp_path)
    with pytest.raises(FormatError, match="p.making is in the way"):
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert files(tmp_path) == before


def test_a_file_put_there_meanwhile_outlives_the_run(raw, tmp_path, monkeypatch):
    rename = os.rename

    def renamed(source, target):
        rename(source, target)
        (tmp_path / "p.making/notes.txt").write_text("mine")

    monkeypatch.setattr(os, "rename", renamed)
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert [path.name for path in (tmp_path / "p.making").iterdir()] == ["notes.txt"]


def test_the_lock_outlives_the_stages(raw, tmp_path, monkeypatch):
    """Killed while it tidies up, a run must leave what the next one knows as ours."""
    seen, rmtree = [], shutil.rmtree

    def seeing(path, **options):
        if path.name == folder.STAGES:
            seen.append((path.parent / folder.LOCK).exists())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", seeing)
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert seen == [True] and not (tmp_path / "p.making").exists()


def test_nothing_is_left_by_a_call_while_another_error_is_handled(raw, tmp_path):
    try:
        dlrm_utils.load_criteo(tmp_path / "p")
    except FileNotFoundError:
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def write_small(path):
    """A file in which three stages take a moment."""
    write_toy_criteo(path, 700)
    return path


@pytest.mark.parametrize("error", [MemoryError, SystemExit, TypeError, OSError, KeyboardInterrupt])
def test_stages_are_kept_after_any_error_but_wrong_rows(tmp_path, monkeypatch, error):
    raw = write_small(tmp_path / "small.txt")
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(folder.Part, "numbers", raises(error))
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    monkeypatch.setattr(encoder, "write_names", raises(AssertionError("numbered again")))
    preprocess_criteo(raw, tmp_path / "p", np.int64(1), progress=False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_disk_that_is_really_full_is_said(tmp_path, monkeypatch):
    """Polars' own error, which has no errno: its parts go to a device that is full."""
    raw, parsed = write_small(tmp_path / "small.txt"), criteo.parsed

    def on_a_full_disk(*arguments):
        for path in tmp_path.glob(f"p.making/{folder.STAGES}/*/unfinished"):
            (path / "000000000").symlink_to("/dev/full")
        return parsed(*arguments)

    monkeypatch.setattr(criteo, "parsed", on_a_full_disk)
    with pytest.raises(OSError, match="the disk is full; make room, run this again"):
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert (tmp_path / "p.making").exists()


def raises(error):
    def function(*_, **__):
        raise error

    return function


def test_stages_of_another_file_or_of_other_options_are_not_used(tmp_path, monkeypatch):
    raw = write_small(tmp_path / "small.txt")
    write_toy_criteo(tmp_path / "other.txt", 700, seed=9)
    preprocess_criteo(raw, tmp_path / "undisturbed", progress=False)
    for source, min_count in [(tmp_path / "other.txt", 1), (raw, 5)]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(folder.Part, "numbers", raises(KeyboardInterrupt))
            preprocess_criteo(source, tmp_path / "p", min_count, progress=False)
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert files(tmp_path / "p") == files(tmp_path / "undisturbed")


def test_stages_of_another_form_are_not_used_and_go(tmp_path, monkeypatch):
    """As a version of the room that wrote other files left them."""
    raw = write_small(tmp_path / "small.txt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder, "STAGE_VERSION", "Arrow")
        patch.setattr(folder.Part, "numbers", raises(KeyboardInterrupt))
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    for part in tmp_path.glob(f"p.making/{folder.STAGES}/*/parts/*/*"):
        part.write_text("another form")
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "small.txt"]


def test_what_gets_its_name_lies_on_the_disk(tmp_path, monkeypatch):
    """A power cut finds whole files under their names: what is renamed was flushed before, and
    the folder that then holds its name is flushed after."""
    flushed, real_fsync, moved, named = set(), os.fsync, [], set()

    def fsync(descriptor):
        real_fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)
        named.discard(os.fstat(descriptor).st_ino)

    def checked(move):
        def function(source, target):
            source = Path(source)
            moved.append(source)
            for path in [source, *source.rglob("*")]:
                assert path.stat().st_ino in flushed, f"{path} is not flushed"
            move(source, target)
            named.add(Path(target).parent.stat().st_ino)

        return function

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", checked(os.replace))
    monkeypatch.setattr(os, "rename", checked(os.rename))
    write_rows(tmp_path / "small.txt")
    preprocess_criteo(tmp_path / "small.txt", tmp_path / "p", progress=False)
    assert len(moved) > 30
    still = {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}
    assert not named & still, "a folder whose new name may be lost"


def test_a_full_disk_is_said_and_finished_stages_are_kept(tmp_path, monkeypatch):
    raw = write_small(tmp_path / "small.txt")
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(folder.Part, "numbers", raises(full))
        with pytest.raises(OSError, match="the disk is full; make room, run this again"):
            preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.making", "small.txt"]
    monkeypatch.setattr(criteo, "frames", raises(AssertionError("read again")))
    preprocess_criteo(raw, tmp_path / "p", progress=False)
    monkeypatch.undo()
    preprocess_criteo(raw, tmp_path / "undisturbed", progress=False)
    assert files(tmp_path / "p") == files(tmp_path / "undisturbed")


# ---- Two that want the same folder ---------------------------------------------------------------


# Over five seconds: two processes import PyTorch.
@pytest.mark.slow
def test_a_second_process_waits_says_for_what_and_opens_it(raw, reference, tmp_path):
    (tmp_path / "p.making").mkdir()
    with FileLock(tmp_path / "p.making" / folder.LOCK):
        process = command(raw, tmp_path / "p")
        said = process.stderr.readline().decode()
        assert f"waiting for another process: it makes {tmp_path / 'p'}" in said
        shutil.copytree(raw.with_name("reference"), tmp_path / "p")  # the other one is done
        changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    assert process.wait() == 0
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["p"] and files(tmp_path / "p")


@pytest.mark.slow
def test_two_started_together_both_open_one_right_folder(raw, reference, tmp_path):
    processes = [command(raw, tmp_path / "p") for _ in range(2)]
    said = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Traceback" not in "".join(said)
    assert files(tmp_path / "p") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_who_waits_for_one_that_fails_makes_the_folder_itself(tmp_path, monkeypatch):
    """In threads, since it is the lock that counts: the first stops, the second goes on."""
    raw, first = write_small(tmp_path / "small.txt"), threading.Event()
    numbers = folder.Part.numbers

    def stops_once(part, encoder):
        if not first.is_set():
            first.set()
            time.sleep(0.3)  # the other one comes to the lock
            raise KeyboardInterrupt
        return numbers(part, encoder)

    monkeypatch.setattr(folder.Part, "numbers", stops_once)
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(preprocess_criteo, raw, tmp_path / "p", progress=False)
        first.wait()
        other = pool.submit(preprocess_criteo, raw, tmp_path / "p", progress=False)
        assert isinstance(failing.exception(), KeyboardInterrupt)
        assert len(other.result()) == 700


# ---- Packed and damaged files --------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["train.txt.gz", "dac.tar.gz", "dac.tgz"])
def test_packed_input_gives_the_same_rows(raw, reference, tmp_path, packed):
    pack(raw, tmp_path, packed)
    preprocess_criteo(tmp_path / packed, tmp_path / "p", progress=False)
    made, plain = files(tmp_path / "p"), dict(reference)
    assert made.pop("source.json") != plain.pop("source.json") and made == plain
    assert not (tmp_path / "p.making").exists()


def pack(raw, folder, name):
    if name == "train.txt.gz":
        with gzip.open(folder / name, "wb", compresslevel=1) as file:
            file.write(raw.read_bytes())
        return
    (folder / "readme.txt").write_text("no data")
    with tarfile.open(folder / name, "w:gz", compresslevel=1) as archive:
        archive.add(folder / "readme.txt", "dac/readme.txt")
        archive.add(raw, "dac/train.txt")


@pytest.mark.parametrize("packed", ["train.txt.gz", "dac.tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "text"])
def test_a_damaged_archive_is_refused(raw, tmp_path, packed, damage):
    pack(raw, tmp_path, packed)
    content = bytearray((tmp_path / packed).read_bytes())
    middle = len(content) // 2
    if damage == "changed":
        content[middle : middle + 9] = b"123456789"
    content = {"cut": content[:middle], "changed": content, "text": b"1\t2\n" * 99}[damage]
    (tmp_path / packed).write_bytes(content)
    with pytest.raises(FormatError, match=packed):
        preprocess_criteo(tmp_path / packed, tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists() and not (tmp_path / "p.making").exists()


def test_an_archive_without_train_txt_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("no data")
    with tarfile.open(tmp_path / "dac.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "readme.txt", "readme.txt")
    with pytest.raises(FormatError, match="holds no file train.txt"):
        preprocess_criteo(tmp_path / "dac.tar.gz", tmp_path / "p", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("length", [300, 777, 4096, 100_000])
def test_pieces_of_any_length_give_the_same_bytes(tmp_path, monkeypatch, length):
    write_toy_criteo(tmp_path / "toy.txt", 300)
    whole = preprocess_criteo(tmp_path / "toy.txt", tmp_path / "whole", progress=False)
    monkeypatch.setattr(shared, "PIECE", length)
    cut = preprocess_criteo(tmp_path / "toy.txt", tmp_path / "cut", progress=False)
    assert files(whole.path) == files(cut.path)


def test_a_file_of_one_endless_line_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "PIECE", 1_000)
    (tmp_path / "long.txt").write_bytes("\t".join(SOUND).encode() + b"\n" + b"1" * 10_000)
    with pytest.raises(FormatError, match="line 2, column 1: over 1,000 bytes"):
        preprocess_criteo(tmp_path / "long.txt", tmp_path / "p", progress=False)


# ---- The fast path against a parser of its own, line by line -----------------------------------


def parsed_slowly(line):
    """What a line as bytes holds, field by field, or None: the rule of the format written again."""
    fields = line.removesuffix(b"\r").split(b"\t")
    digits, hexadecimal = set(b"0123456789"), set(b"0123456789abcdefABCDEF")
    if len(fields) != 40 or fields[0] not in (b"0", b"1"):
        return None
    values = [int(fields[0])]
    for number in fields[1:14]:
        figures = number.removeprefix(b"-")
        if number and not (
            0 < len(figures) <= 10 and set(figures) <= digits and abs(int(number)) < 2**31
        ):
            return None
        values.append(int(number) if number else None)
    for category in fields[14:]:
        if category and not (len(category) == 8 and set(category) <= hexadecimal):
            return None
        values.append(int(category, 16) if category else None)
    return values


PIECES = list("019-+_ afFgx.\t\r\0") + [
    "12345678",
    "deadBEEF",
    "2147483647",
    "2147483648",
    "é",
    "\ufeff",
]
SOUND = ["1", *["7"] * 13, *["0000abcd"] * 26]


@pytest.mark.slow
@settings(max_examples=1_500)
@given(
    st.lists(st.sampled_from(PIECES), max_size=5), st.integers(0, 39), st.booleans(), st.booleans()
)
@example(["1", "5", "\r"], 3, True, True)
@example([""], 39, True, True)
def test_the_fast_path_accepts_and_reads_what_the_format_allows(pieces, place, crlf, ended):
    fields = list(SOUND)
    fields[place] = "".join(pieces)
    line = "\t".join(fields).encode() + b"\r" * crlf
    expected = parsed_slowly(line)
    text = b"\n".join([line] * 2) + b"\n" * ended
    try:
        frame = criteo.parsed(text, "x", 5)
    except FormatError as error:
        assert expected is None and str(error).startswith("x, line 5, column ")
        return
    categories = [None if field is None else int(field, 16) for field in frame.row(1)[14:]]
    assert [*frame.row(1)[:14], *categories] == expected and len(frame) == 2


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 500))
def test_random_bytes_in_a_file_are_read_by_the_rule_or_refused(noise, place):
    text = "".join("\t".join(SOUND) + "\n" for _ in range(3)).encode()
    text = text[:place] + noise + text[place + len(noise) :]
    lines = text.removesuffix(b"\n").split(b"\n")
    wrong = [number for number, line in enumerate(lines, 1) if parsed_slowly(line) is None]
    try:
        frame = criteo.parsed(text, "x", 1)
    except FormatError as error:
        assert str(error).startswith(f"x, line {wrong[0]}, column ")
        return
    assert not wrong and len(frame) == len(lines)


def test_work_in_threads_keeps_order_raises_and_does_not_run_ahead():
    squares = shared.in_order(lambda k: k * k, range(100), threads=3)
    assert list(squares) == [k * k for k in range(100)]
    assert list(shared.in_order(str, [], threads=3)) == []

    def breaks():
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(shared.in_order(str, breaks(), threads=1))
    with pytest.raises(ZeroDivisionError):
        list(shared.in_order(lambda k: 1 / k, [1, 0], threads=2))
    made = []
    for item in shared.in_order(int, (made.append(k) or k for k in range(1000)), threads=2):
        if item == 3:
            break
    assert len(made) < 20  # memory stays bounded however long the input


@given(st.integers(0, 5_000), st.integers(1, 50), st.integers(1, 20))
def test_the_shuffle_is_a_permutation_of_the_rows(rows, run, runs_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlrm_utils, "RUN", run)
        patch.setattr(dlrm_utils, "RUNS_AT_ONCE", runs_at_once)
        order = shuffled_rows(range(10, 10 + rows), 0)
    assert sorted(order.tolist()) == list(range(10, 10 + rows))
    for start in range(0, rows, run * runs_at_once):  # few runs at a time, each of them whole
        together = order[start : start + run * runs_at_once]
        assert len(set((together - 10) // run)) <= runs_at_once + 1


def test_the_shuffle_mixes_even_a_sorted_file():
    labels = np.arange(1_000_000) >= 744_000  # all clicks at the end
    order = shuffled_rows(range(len(labels)), 0)
    shares = labels[order][: len(order) // 256 * 256].reshape(-1, 256).mean(1)  # of batches of 256
    by_chance = np.sqrt(0.256 * 0.744 / 256)
    assert shares.std() < 2 * by_chance
    assert not np.array_equal(order, shuffled_rows(range(len(labels)), 1))
