"""The README's examples, run as they stand there, one after the other, on small files."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import dlrm_models
import dlrm_utils
from conftest import ROOT
from data.criteo import COLUMNS
from data.toy_clicks import write_toy_criteo
from test_settings import new_checkout

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = 300
LEFT_OUT = ("make test", "make benchmark", "make lab", "make check", "make run")


def examples(text=README):
    """(language, code) of each block that names its language, in order."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def recipes(heading):
    """The Python blocks under a heading."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [code for language, code in examples(section) if language == "python"]


def write_files():
    """Every file that the examples name, in the folder where they run."""
    for name in ("x4", "terabyte", "data", "build"):
        Path(name).mkdir(exist_ok=True)
    write_toy_criteo("data/train.txt", 4000)  # more than one batch of TorchRec
    write_toy_criteo("toy.txt", ROWS)
    frame = pl.read_csv("toy.txt", separator="\t", has_header=False, new_columns=COLUMNS)
    header = {name: name.title() if name == "label" else name for name in COLUMNS}
    for part in ("train", "test"):
        frame.rename(header).write_csv(f"x4/{part}.csv")
    for day in range(24):
        write_toy_criteo("day.txt", 20, seed=day)
        Path(f"terabyte/day_{day}.gz").write_bytes(gzip.compress(Path("day.txt").read_bytes()))
    rng = np.random.default_rng(0)
    events = {"age": rng.integers(18, 80, ROWS), "price": rng.random(ROWS)}
    events |= {"city": rng.choice(["Rome", "Oslo"], ROWS), "device": rng.choice(["a", "b"], ROWS)}
    events["bought"] = rng.random(ROWS) < 0.3
    pl.DataFrame(events).write_parquet("events.parquet")
    ratings = {"userId": rng.integers(0, 60, 3000), "itemId": rng.integers(0, 40, 3000)}
    ratings |= {"rating": rng.integers(1, 6, 3000), "timestamp": rng.permutation(3000)}
    ratings = pl.DataFrame(ratings).unique(["userId", "itemId"], maintain_order=True)
    ratings.write_csv("ratings.csv")
    ratings.write_parquet("ratings.parquet")


def given_names(notebook, clicks):
    """What an example takes from the reader: clicks, lines, and a model of the notebook's."""
    torch.manual_seed(0)
    model = notebook.DLRM(clicks.table_sizes, 16, [64], [64])
    lines = ["1" + "\t" * 39, "0" + "\t" * 39]
    return {"torch": torch, "model": model, "clicks": clicks, "lines": lines}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files()


@pytest.mark.slow  # 24 days, each unpacked and checked
def test_tables_larger_than_memory(files):
    (recipe,) = recipes("Any table larger than memory")
    made = {}
    exec(recipe, made)
    assert len(dlrm_utils.load_criteo("data/x4")) == 2 * ROWS
    days = dlrm_utils.load_criteo("data/terabyte")
    assert (len(days), days.train) == (480, range(460))
    events = made["events"]
    assert events.dense.shape == (ROWS, 2) and events.sparse.shape == (ROWS, 1)
    batch = events.batch(range(5))
    assert torch.isfinite(batch.dense).all() and len(batch.indices) == 1


def test_save_and_load(notebook, toy, tmp_path, monkeypatch):
    (recipe,) = recipes("Save, load, score a file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    made = given_names(notebook, toy)
    model, lines = made["model"], made["lines"]
    exec(recipe, made)
    again, encoder = dlrm_models.load_model("build/mine")
    expected = torch.sigmoid(model(*toy.encode(lines)[:3]))
    assert torch.equal(torch.sigmoid(again(*encoder.encode(lines)[:3])), expected)


# ---- All of them, in order -------------------------------------------------------------------


def commands(block):
    """The lines of a shell block that a test can run, without comments."""
    lines = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *LEFT_OUT))]


def run_in_shell(command, checkout):
    """Run one line as the reader does who has activated the environment."""
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-500:]}\n{done.stderr[:2000]}"


def test_lines_of_shell_are_found_and_left_out():
    block = "make test     # long\npython a.py \\\n  --b 1   # short\n\n# alone\npapermill x y\n"
    assert commands(block) == ["python a.py    --b 1", "papermill x y"]
    assert sum(language == "sh" for language, _ in examples()) >= 3


@pytest.mark.skipif(sys.platform == "win32", reason="the lines are a Unix shell's")
@pytest.mark.slow  # three runs of a shortened notebook and some processes, a minute in all
def test_every_example_runs_in_the_readmes_order(notebook, toy, tmp_path, monkeypatch):
    """In one checkout, where DLRM.ipynb is the shortened notebook of test_settings."""
    pytest.importorskip("torchrec")
    checkout = new_checkout(tmp_path)
    (checkout / "DLRM.ipynb").unlink()
    notebook_text = (checkout / "short.ipynb").read_text(encoding="utf-8")
    assert "num_rows = 200_000" in notebook_text
    smaller = notebook_text.replace("num_rows = 200_000", "num_rows = 3_000")
    (checkout / "DLRM.ipynb").write_text(smaller, encoding="utf-8")
    monkeypatch.chdir(checkout)
    write_files()
    inline = re.findall(r"`(papermill [^`]+)`", README)  # such as another seed
    assert inline
    for command in inline:
        run_in_shell(command, checkout)
    for language, code in examples():
        if language == "python":
            exec(code, given_names(notebook, toy))
        for command in commands(code) if language == "sh" else []:
            run_in_shell(command, checkout)
