"""The folder of arrays: its place, its files, bags, a fitted encoder, what a second call does."""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import dlrm_utils
from data import criteo, folder, tables
from data.files import FormatError
from dlrm_utils import FrameEncoder, load_criteo, preprocess_criteo, preprocess_table

LINE = "\t".join(["{label}", *["{k}"] * 13, *["{name:08x}"] * 26]) + "\n"


def write_lines(path, rows=21, first=0):
    lines = (LINE.format(label=k % 2, k=k, name=first + k % 5) for k in range(rows))
    path.write_text("".join(lines))
    return path


def ratings(rows=700, seed=0):
    """A table with bags: some are empty, some missing; tags of the last seventh are new."""
    rng = np.random.default_rng(seed)
    tags = [[f"t{t}" for t in rng.integers(0, 9, n)] for n in rng.integers(0, 5, rows)]
    tags[3], tags[4] = None, ["t1", None, "t1"]
    for k in range(rows * 6 // 7, rows, 3):
        tags[k] = ["new", *(tags[k] or [])]
    frame = {
        "age": np.where(rng.random(rows) < 0.1, math.nan, rng.normal(40, 9, rows)),
        "visits": rng.integers(-1, 50, rows),
        "city": rng.choice(["Rome", "Oslo", "", "Bonn"], rows).tolist(),
        "tags": tags,
        "years": [rng.integers(1990, 1999, n).tolist() for n in rng.integers(0, 3, rows)],
        "click": rng.integers(0, 2, rows),
    }
    return pl.DataFrame(frame)


COLUMNS = dict(dense=["age"], counts=["visits"], categorical=["city"], multi_hot=["tags", "years"])


def equal(one, other):
    """Are two batches the same to the bit?"""
    lists = zip([*one.indices, *one.offsets], [*other.indices, *other.offsets], strict=True)
    labels = one.labels is other.labels or torch.equal(one.labels, other.labels)
    return torch.equal(one.dense, other.dense) and labels and all(torch.equal(*p) for p in lists)


# ---- Where a folder lies -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run[1]", "a*b", "x?", "{p}", "[!a]"])
def test_no_folders_name_is_a_pattern(tmp_path, name):
    """Beside siblings that the name would match, made of other names."""
    for other in ("run1", "ab", "aab", "xy", "p", "b"):
        raw = write_lines(tmp_path / f"{other}.txt", first=100)
        preprocess_criteo(raw, tmp_path / other, progress=False)
    raw = write_lines(tmp_path / f"{name}.txt")
    data = preprocess_criteo(raw, tmp_path / name, progress=False)
    assert data.sparse[:5, 0].tolist() == [1, 2, 3, 4, 5]
    again = load_criteo(tmp_path / name)
    assert again.encode(raw.read_text()).indices[0].tolist() == data.sparse[:, 0].tolist()
    frame = pl.DataFrame({"label": [0, 1] * 7, "a": ["x", "y"] * 7})
    for suffix, write in ((".csv", frame.write_csv), (".parquet", frame.write_parquet)):
        write(tmp_path / f"{name}{suffix}")
        write(tmp_path / f"run1{suffix}")
        made = tmp_path / f"{name}{suffix}.p"
        data = preprocess_table(
            tmp_path / f"{name}{suffix}", made, [], ["a"], "label", progress=False
        )
        assert len(data) == 14 and data.encode({"a": "y"}).indices[0].tolist() == [2]


@pytest.mark.parametrize("target", ["empty", "absent"])
def test_a_link_to_a_folder_stays_a_link(tmp_path, target):
    raw = write_lines(tmp_path / "raw.txt")
    (tmp_path / "disk").mkdir()
    if target == "empty":
        (tmp_path / "disk/empty").mkdir()
    (tmp_path / "p").symlink_to(tmp_path / "disk" / target, target_is_directory=True)
    assert len(preprocess_criteo(raw, tmp_path / "p", progress=False)) == 21
    assert (tmp_path / "p").is_symlink() and len(load_criteo(tmp_path / "disk" / target)) == 21
    assert sorted(path.name for path in tmp_path.rglob("*.making")) == []


@pytest.mark.parametrize("where", [".", "..", "", "a mount"])
def test_a_folder_that_cannot_be_replaced_is_refused_at_once(tmp_path, monkeypatch, where):
    raw = write_lines(tmp_path / "raw.txt")
    (tmp_path / "here/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/deep")
    monkeypatch.setattr(criteo, "parsed", None)  # no row is read
    if where == "a mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "a mount")
    with pytest.raises(FormatError, match="name a new folder in it"):
        preprocess_criteo(raw, where, progress=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "here", "raw.txt"]


@pytest.mark.parametrize("processed", ["raw.txt", "day"])
def test_no_input_is_emptied(tmp_path, processed):
    """Nor one that has the name of the folder for stages."""
    raws = [write_lines(tmp_path / name) for name in ("raw.txt", "day.making")]
    before = [raw.read_bytes() for raw in raws]
    for raw in raws:
        with pytest.raises((FormatError, ValueError), match="is a file|in the way"):
            preprocess_criteo(raw, tmp_path / processed, progress=False)
    assert [raw.read_bytes() for raw in raws] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_an_older_version_is_refused_with_what_makes_it_anew(tmp_path):
    raw = write_lines(tmp_path / "raw.txt")
    (tmp_path / "p").mkdir()
    old = {"format": "dlrm_utils.criteo 4", "fingerprint": "0", "source": {}}
    (tmp_path / "p/source.json").write_text(json.dumps(old))
    for call in (load_criteo, lambda path: preprocess_criteo(raw, path, progress=False)):
        with pytest.raises(FormatError, match="python dlrm_utils.py preprocess RAW FOLDER"):
            call(tmp_path / "p")


# ---- Vocabularies are named after place and column -----------------------------------------------


def test_vocabularies_of_columns_with_numbers_of_their_own(tmp_path):
    """Avazu's columns are called C1, C14 to C21; others are no names for files."""
    names = ["hour", "C1", *[f"C{k}" for k in range(14, 22)], "a/b", "*", "ab", "", "é" * 99]
    frame = pl.DataFrame({"click": [0, 1] * 7} | {n: [f"{n} x", f"{n} y"] * 7 for n in names})
    data = preprocess_table(frame, tmp_path / "p", [], names, "click", progress=False)
    files = [path.name for path in (tmp_path / "p/encoder").glob("*.csv")]
    assert {"2-C1.csv", "3-C14.csv", "10-C21.csv", "11-ab.csv", "13-ab.csv"} <= {*files}
    assert len(files) == len(names) == 15
    table = pl.read_csv(tmp_path / "p/encoder/3-C14.csv")
    assert table["name"].to_list() == ["C14 x", "C14 y"] == data.encoder.names("C14").to_list()


# ---- Bags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_together", [7, 100, 1 << 17])
def test_bags_in_a_folder_are_those_of_a_frame(tmp_path, monkeypatch, rows_together):
    monkeypatch.setattr(tables, "PIECE_ROWS", rows_together)
    frame = ratings()
    data = preprocess_table(frame, tmp_path / "p", **COLUMNS, label="click", progress=False)
    encoder = FrameEncoder(**COLUMNS, label="click").fit(frame[:600])
    assert data.encoder.fingerprint() == encoder.fingerprint()
    expected = encoder.transform(frame)
    assert equal(data.batch(range(700)), expected) and equal(data.encode(frame), expected)
    for rows in ([5, 699, 3, 5], slice(2, 9), range(600, 610), data.labels == 1, [], -1):
        assert equal(data.batch(rows), expected.take(rows))
    assert "new" not in data.encoder.names("tags").to_list()
    ids = np.load(tmp_path / "p/bags-4.npy", mmap_mode="r")
    offsets = np.load(tmp_path / "p/offsets-4.npy", mmap_mode="r")
    bags = [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
    named = [None, *data.encoder.names("tags").to_list()]
    found = [[named[i] for i in bag] for bag in bags]
    assert found[4] == ["t1", None, "t1"] and found[3] == []
    assert found[:600] == [bag or [] for bag in frame["tags"].to_list()[:600]]


def test_shuffled_batches_train_on_bags_and_read_each_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dlrm_utils, "RUN", 50)
    monkeypatch.setattr(dlrm_utils, "RUNS_AT_ONCE", 4)
    frame = ratings()
    data = preprocess_table(frame, tmp_path / "p", **COLUMNS, label="click", progress=False)
    taken = [batch for *_, batch in dlrm_utils.shuffled_batches(data.batch, data.train, 64)]
    order = dlrm_utils.shuffled_rows(data.train, [0, 0])
    assert equal(taken[2], data.batch(order[128:192])) and len(taken) == 10
    bag = torch.nn.EmbeddingBag(data.table_sizes[1], 2, mode="sum")
    assert bag(taken[0].indices[1], taken[0].offsets[1]).shape == (64, 2)


def test_a_folder_with_bags_travels_as_its_path_and_reads_ahead(tmp_path):
    data = preprocess_table(ratings(), tmp_path / "p", **COLUMNS, progress=False)
    sent = pickle.loads(pickle.dumps(data))
    sent.read_ahead(range(0, 700, 9))
    assert equal(sent.batch([1, 2]), data.batch([1, 2])) and sent.labels is None


@pytest.mark.parametrize("kind", ["dense", "counts", "categorical", "multi_hot"])
def test_a_table_of_one_kind_of_column_is_a_table(tmp_path, kind):
    frame = ratings()
    data = preprocess_table(frame, tmp_path / "p", **{kind: COLUMNS[kind]}, progress=False)
    assert equal(load_criteo(tmp_path / "p").batch([1, 5]), data.encoder.transform(frame[[1, 5]]))
    assert data.labels is None and len(data) == 700 and len(data.train) == 600


# ---- A fitted encoder ----------------------------------------------------------------------------


def test_an_encoder_that_is_not_fitted_is_fitted_by_the_training_rows(tmp_path):
    frame, encoder = ratings(), FrameEncoder(**COLUMNS, label="click", min_count=20)
    data = preprocess_table(frame, tmp_path / "p", encoder=encoder, progress=False)
    alone = FrameEncoder(**COLUMNS, label="click", min_count=20).fit(frame[:600])
    assert encoder.fingerprint() == alone.fingerprint() == data.encoder.fingerprint()
    assert equal(encoder.transform(frame), alone.transform(frame))
    again = FrameEncoder(**COLUMNS, label="click", min_count=20)  # the folder is there
    preprocess_table(frame, tmp_path / "p", encoder=again, progress=False)
    assert again.fingerprint() == alone.fingerprint()


def test_a_fitted_encoder_is_used_as_it_stands(tmp_path):
    frame, july = ratings(), ratings(90, seed=7)
    encoder = FrameEncoder(**COLUMNS, label="click").fit(frame)
    july.write_parquet(tmp_path / "july.parquet")
    data = preprocess_table(
        tmp_path / "july.parquet", tmp_path / "july", encoder=encoder, progress=False
    )
    assert data.encoder.fingerprint() == encoder.fingerprint()
    assert equal(data.batch(range(90)), encoder.transform(july))
    with pytest.raises(ValueError, match="was made from"):
        preprocess_table(july, tmp_path / "july", **COLUMNS, label="click", progress=False)
    wrong = july.with_columns(city=pl.lit(5))
    with pytest.raises(FormatError, match="'city'"):
        preprocess_table(wrong, tmp_path / "wrong", encoder=encoder, progress=False)


@pytest.mark.parametrize(
    "more", [{"dense": ["age"]}, {"label": "click"}, {"min_count": 2}, {"max_table_rows": 9}]
)
def test_an_encoder_and_names_together_are_refused(tmp_path, more):
    with pytest.raises(ValueError, match="the encoder has its own names"):
        preprocess_table(ratings(), tmp_path / "p", encoder=FrameEncoder(["age"]), **more)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_leaves_float32_is_named_by_its_row(tmp_path):
    frame = pl.DataFrame({"x": [1e-30, 3e-30] * 9 + [1e10] * 3, "y": ["a"] * 21})
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(FormatError, match="t.parquet, row 19, column 'x': 10000000000.0 is too"):
        preprocess_table(tmp_path / "t.parquet", tmp_path / "p", ["x"], ["y"], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("value", [4.0, 4])
def test_numbers_go_by_name_not_by_type(tmp_path, value):
    """Whole floats are scaled as fractions are, integers of a dense column likewise."""
    frame = pl.DataFrame({"x": [value, value * 2] * 7, "n": [value, value * 2] * 7})
    data = preprocess_table(frame, tmp_path / "p", ["x"], counts=["n"], progress=False)
    expected = [[-1, math.log(5)], [1, math.log(9)]]
    assert np.allclose(data.batch([0, 1]).dense, expected)
    assert data.dense.dtype == np.int32 and data.dense[:2].tolist() == [[4, 4], [8, 8]]


# ---- What is said --------------------------------------------------------------------------------


def test_a_lazy_frame_in_the_same_order_is_the_same_table(tmp_path):
    frame = ratings()
    lazy = frame.lazy().with_columns(pl.col("visits") + 0)
    for table in (lazy, lazy, frame):
        preprocess_table(table, tmp_path / "p", **COLUMNS, label="click", progress=False)
    with pytest.raises(ValueError, match="was made from"):
        preprocess_table(lazy.reverse(), tmp_path / "p", **COLUMNS, label="click", progress=False)
    assert "same order" in preprocess_table.__doc__


def test_a_folder_that_was_there_has_no_speed(tmp_path, capsys):
    arguments = ["preprocess", str(write_lines(tmp_path / "raw.txt")), str(tmp_path / "p")]
    dlrm_utils.main(arguments)
    dlrm_utils.main(arguments)
    made, opened = capsys.readouterr().out.splitlines()
    assert "21 rows in" in made and "rows/s" in made
    assert "21 rows" in opened and "made before" in opened and "rows/s" not in opened


def test_no_bars_where_they_are_switched_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(folder, "progress", eager(folder.progress))
    monkeypatch.setattr(dlrm_utils, "progress", eager(dlrm_utils.progress))
    data = preprocess_criteo(write_lines(tmp_path / "raw.txt"), tmp_path / "p")
    list(dlrm_utils.shuffled_batches(data.batch, data.train, 4))
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("TQDM_DISABLE")
    preprocess_criteo(tmp_path / "raw.txt", tmp_path / "q")
    assert "reading 1 of 1" in capsys.readouterr().err


def eager(progress):
    """Bars at once, not only after half a second."""
    return lambda *arguments, **options: progress(*arguments, **options, delay=0, mininterval=0)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write")
def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path, monkeypatch):
    raw = write_lines(tmp_path / "raw.txt")
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(criteo, "parsed", None)
    with pytest.raises(PermissionError, match="locked"):
        preprocess_criteo(raw, tmp_path / "locked/p", progress=False)
