"""The README's recipes, run as they stand there, on small files of the kinds that they name."""

import gzip
import re

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import dlrm_utils
from conftest import ROOT
from data.toy_clicks import write_toy_criteo
from dlrm_utils import COLUMNS

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = 300


def recipes(heading):
    """The Python blocks under a heading."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Every file that the recipes name, in the folder where they run."""
    monkeypatch.chdir(tmp_path)
    for name in ("x4", "terabyte", "avazu", "data"):
        (tmp_path / name).mkdir()
    write_toy_criteo(tmp_path / "toy.txt", ROWS)
    frame = pl.read_csv("toy.txt", separator="\t", has_header=False, new_columns=COLUMNS)
    header = {name: name.title() if name == "label" else name for name in COLUMNS}
    for part in ("train", "test"):
        frame.rename(header).write_csv(f"x4/{part}.csv")
    for day in range(24):
        write_toy_criteo(tmp_path / f"terabyte/day_{day}.gz.txt", 20, seed=day)
        packed = gzip.compress((tmp_path / f"terabyte/day_{day}.gz.txt").read_bytes())
        (tmp_path / f"terabyte/day_{day}.gz").write_bytes(packed)
    rng = np.random.default_rng(0)
    avazu = {"id": rng.random(ROWS), "click": rng.integers(0, 2, ROWS)}
    avazu["hour"] = 14102100 + rng.integers(0, 24, ROWS)
    for k in range(21):
        avazu[f"C{k}"] = rng.integers(0, 9, ROWS) if k % 2 else rng.choice(["a1b2", "c3d4"], ROWS)
    pl.DataFrame(avazu).write_csv("avazu/train.csv")
    events = {"age": rng.integers(18, 80, ROWS), "price": rng.random(ROWS)}
    events |= {"city": rng.choice(["Rome", "Oslo"], ROWS), "device": rng.choice(["a", "b"], ROWS)}
    events["bought"] = rng.random(ROWS) < 0.3
    pl.DataFrame(events).write_parquet("events.parquet")


@pytest.mark.slow  # 24 days, each unpacked and checked
def test_tables_larger_than_memory(files):
    (recipe,) = recipes("Any table larger than memory")
    made = {"polars": pl}
    exec(recipe, made)
    assert len(dlrm_utils.load_criteo("data/x4")) == 2 * ROWS
    days = dlrm_utils.load_criteo("data/terabyte")
    assert (len(days), days.train) == (480, range(460))
    avazu = dlrm_utils.load_criteo("data/avazu")
    assert avazu.dense.shape == (ROWS, 0) and avazu.sparse.shape == (ROWS, 22)
    assert avazu.table_sizes[0] <= 25  # hours of a day, not of a week
    events = made["events"]
    assert events.dense.shape == (ROWS, 2) and events.sparse.shape == (ROWS, 2)
    batch = events.batch(range(5))
    assert torch.isfinite(batch.dense).all() and len(batch.indices) == 2


def test_a_table_of_ones_own(notebook):
    (recipe,) = recipes("Your own table")
    frame = pd.DataFrame({"age": [20.0, 40.0], "city": ["Rome", "Oslo"]})
    frame = frame.assign(device="a", tags=[["x"], []], click=[1, 0])
    made = {
        "dlrm_utils": dlrm_utils,
        "train_frame": frame,
        "any_frame": frame,
        "DLRM": notebook.DLRM,
    }
    exec(recipe, made)
    assert made["model"](*made["batch"][:3]).shape == (2,)


def test_save_and_load(notebook, toy, tmp_path, monkeypatch):
    (recipe,) = recipes("Save, load, score a file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    torch.manual_seed(0)
    model = notebook.DLRM(toy.table_sizes, 16, [64], [64])
    lines = ["1" + "\t" * 39, "0" + "\t" * 39]
    made = {"dlrm_utils": dlrm_utils, "torch": torch, "clicks": toy, "model": model}
    exec(recipe, made | {"lines": lines})
    again, encoder = dlrm_utils.load_model("build/mine")
    expected = torch.sigmoid(model(*toy.encode(lines)[:3]))
    assert torch.equal(torch.sigmoid(again(*encoder.encode(lines)[:3])), expected)
