"""The programs that measure the companion still run; what they print at a small size is sound."""

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


def program(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("memory, where", [(1 << 30, "in memory"), (0, "on the disk")])
def test_a_column_is_numbered(capsys, monkeypatch, memory, where):
    numbering = program("numbering")
    monkeypatch.setattr(numbering.folder, "MERGE_MEMORY", memory)
    numbering.number(400_000, 1000)
    line = capsys.readouterr().out
    before, most = map(float, re.findall(r"([\d.]+) (?:GB before|at most)", line))
    assert f"400,000 rows,       1,000 names, {where}" in line and 0 < before <= most


# Opens a saved model in a process of its own.
@pytest.mark.slow
def test_a_model_of_many_names_is_opened_elsewhere(capsys):
    program("many_names").main(0.001)
    printed = capsys.readouterr().out
    assert "33,7" in printed and "the same logit: True" in printed
    assert re.search(r"the first line: [\d.]+ s of processor time, [\d.]+ GB", printed)


def test_frames_encode_alike_in_two_versions(capsys):
    frames = program("frames")
    frames.main(2000)
    frames.main("2000", frames.ROOT / "dlrm_utils.py")
    first, second = re.findall(r"sum of ids (\d+)", capsys.readouterr().out)
    assert first == second != "0"


@pytest.mark.slow  # it preprocesses in new processes, some of which it kills
def test_rows_are_preprocessed_and_kills_leave_nothing(tmp_path, capsys):
    preprocessing = program("preprocessing")
    preprocessing.measure(tmp_path, 5000, beside=preprocessing.ROOT, turns=1)
    preprocessing.killed(tmp_path, rows=20_000, kills=2)
    preprocessing.bags(tmp_path, 2000)
    printed = capsys.readouterr().out
    assert "5,000 rows, now" in printed and "arrays equal: True" in printed
    equal, runs = re.search(r"run (\d+) of (\d+) folders are equal", printed).groups()
    assert "2 kills that met a stage" in printed and equal == runs
    assert "2,000 bags, as in a frame: True; batches of 2048" in printed
