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


@pytest.mark.slow  # it writes and numbers a million rows
def test_a_column_is_numbered(capsys):
    program("numbering").number(1_000_000, 1000)
    line = capsys.readouterr().out
    before, most = map(float, re.findall(r"([\d.]+) (?:GB before|at most)", line))
    assert "1,000,000 rows,       1,000 names" in line and 0 < before <= most


def test_frames_encode_alike_in_two_versions(capsys):
    frames = program("frames")
    frames.main(2000)
    frames.main("2000", frames.ROOT / "dlrm_utils.py")
    first, second = re.findall(r"sum of ids (\d+)", capsys.readouterr().out)
    assert first == second != "0"


@pytest.mark.slow  # it preprocesses in new processes, some of which it kills
def test_rows_are_preprocessed_and_kills_leave_nothing(tmp_path, capsys):
    preprocessing = program("preprocessing")
    preprocessing.measure(tmp_path, 5000)
    preprocessing.killed(tmp_path, rows=5000, kills=2)
    printed = capsys.readouterr().out
    assert "5,000 rows: written" in printed
    assert "2 kills: 2 folders equal" in printed
