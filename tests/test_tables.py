"""Any table in the folder, days in several files, and the folder's object."""

import collections
import gzip
import math
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import dlrm_utils
from conftest import ROOT
from data import folder, tables
from data.criteo import CATEGORIES, INTEGERS
from data.files import MISSING, FormatError
from data.toy_clicks import write_toy_criteo
from dlrm_utils import (
    FrameEncoder,
    load_criteo,
    preprocess_criteo,
    preprocess_table,
    shuffled_batches,
)

COLUMNS = dict(dense=["price"], counts=["age"], categorical=["city", "hour", "new"], label="bought")
NAMES = ["label", *INTEGERS, *CATEGORIES]


def table(rows=700, seed=0):
    rng = np.random.default_rng(seed)
    city = rng.choice(["Rome", "Ürümqi", "a, b", 'with "quotes"', "", None, "01", "1"], rows)
    return pl.DataFrame(
        {
            "price": np.where(rng.random(rows) < 0.1, np.nan, rng.normal(0, 9, rows)),
            "unused": np.arange(rows),
            "age": pl.Series([None if k % 9 == 0 else k % 80 - 2 for k in range(rows)]),
            "city": pl.Series([None if c is None else str(c) for c in city]),
            "hour": rng.integers(14_102_100, 14_102_124, rows),
            "new": rng.random(rows) < 0.5,
            "bought": rng.integers(0, 2, rows),
        }
    )


def ids_slowly(values, train_rows, min_count=1, max_rows=None):
    counts = collections.Counter(values[:train_rows])
    kept = [value for value in dict.fromkeys(values[:train_rows]) if counts[value] >= min_count]
    kept = sorted(kept, key=lambda value: -counts[value])[
        : None if max_rows is None else max_rows - 1
    ]
    ids = {value: k for k, value in enumerate(kept, 1)}
    return [ids.get(value, 0) for value in values]


@pytest.mark.parametrize("options", [(1, None), (20, None), (1, 4)])
@pytest.mark.parametrize("kind", ["frame", "lazy", "parquet"])
def test_a_table_of_ones_own_equals_the_slow_reader(tmp_path, monkeypatch, kind, options):
    monkeypatch.setattr(tables, "PIECE_ROWS", 100)
    frame = table()
    frame.write_parquet(tmp_path / "t.parquet")
    given = {"frame": frame, "lazy": frame.lazy(), "parquet": str(tmp_path / "t.parquet")}[kind]
    data = preprocess_table(given, tmp_path / "p", **COLUMNS, min_count=options[0],
                            max_table_rows=options[1], progress=False)  # fmt: skip
    assert np.array_equal(data.dense[:, 0], frame["price"].to_numpy(), equal_nan=True)
    ages = frame["age"].cast(pl.Float64).fill_null(math.nan)
    assert np.array_equal(data.dense[:, 1], ages.to_numpy(), equal_nan=True)
    assert data.labels.tolist() == frame["bought"].to_list() and len(data.train) == 600
    for k, name in enumerate(COLUMNS["categorical"]):
        values = [None if value == "" else value for value in frame[name].to_list()]
        assert data.sparse[:, k].tolist() == ids_slowly(values, 600, *options)
    prices = [price for price in frame["price"].to_list()[:600] if not math.isnan(price)]
    mean, deviation = np.mean(prices), np.std(prices)
    batch = data.batch([5, 9, 14])
    for n, row in enumerate([5, 9, 14]):
        price, age = frame["price"][row], frame["age"][row]
        scaled = 0 if math.isnan(price) else (price - mean) / deviation
        expected = [scaled, math.log1p(max(age or 0, 0))]
        assert np.allclose(batch.dense[n], expected, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_star_in_a_tables_name_is_a_star(tmp_path, suffix):
    frame = pl.DataFrame({"label": [0, 1] * 10, "name": ["a", "b"] * 10})
    for name, rows in (("day*", frame), ("day2", frame[:9])):
        path = tmp_path / f"{name}.{suffix}"
        rows.write_csv(path) if suffix == "csv" else rows.write_parquet(path)
    star = tmp_path / f"day*.{suffix}"
    data = preprocess_table(star, tmp_path / "p", [], ["name"], "label", progress=False)
    assert len(data) == 20


def test_a_table_in_another_order_is_another_table(tmp_path):
    frame = pl.DataFrame({"label": [0, 1] * 10, "name": [f"name {k}" for k in range(20)]})
    preprocess_table(frame, tmp_path / "p", [], ["name"], "label", progress=False)
    for other in (frame.reverse(), frame.vstack(frame[:1]).vstack(frame[:1])):
        with pytest.raises(ValueError, match="was made from"):
            preprocess_table(other, tmp_path / "p", [], ["name"], "label", progress=False)


def test_ties_are_kept_by_first_sight_over_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE_ROWS", 2)
    names = [f"name {k * 17 % 40}" for k in range(40)]
    names = names + names[::-1] + names[::3]
    frame = pl.DataFrame({"label": [k % 2 for k in range(len(names))], "name": names})
    data = preprocess_table(frame, tmp_path / "p", [], ["name"], "label", progress=False)
    counted = collections.Counter(names[: len(data.train)])
    assert data.encoder.names("name").to_list() == [name for name, _ in counted.most_common()]


def many_names():
    """300,000 rows of 150,000 long names, of which the last seventh brings new ones."""
    numbers = np.random.default_rng(0).permutation(150_000).repeat(2)
    names = pl.Series(numbers).cast(pl.String) + " and a text that takes some memory"
    return pl.DataFrame({"clicked": np.arange(300_000) % 2, "name": names})


def test_names_that_outgrow_memory_go_to_the_disk(tmp_path, monkeypatch):
    """That these do is shown by the next test, where the disk has no room for them."""
    rows = many_names()
    on_a_small_machine(monkeypatch)
    data = preprocess_table(rows, tmp_path / "p", [], ["name"], "clicked", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    expected = ids_slowly(rows["name"].to_list(), len(data.train))
    assert data.sparse[:, 0].tolist() == expected


def on_a_small_machine(monkeypatch, **more):
    """A megabyte for a merge in memory, and little for the engine that spills."""
    monkeypatch.setattr(folder, "MERGE_MEMORY", 1 << 20)
    options = {"memory_limit": "42MB", "threads": 2} | more
    monkeypatch.setattr(folder, "ENGINE", options)


def test_a_disk_too_small_for_the_names_is_said(tmp_path, monkeypatch):
    arguments = (many_names(), tmp_path / "p", [], ["name"], "clicked")
    with monkeypatch.context() as patch:
        on_a_small_machine(patch, max_temp_directory_size="1MB")
        with pytest.raises(OSError, match="the disk is full; make room, run this again"):
            preprocess_table(*arguments, progress=False)
    assert len(preprocess_table(*arguments, progress=False)) == 300_000
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("options", [(1, None), (2, None), (1, 3), (3, 2)])
def test_in_memory_and_on_the_disk_names_get_the_same_ids(tmp_path, monkeypatch, options):
    """Against ids counted one by one; with a missing name, ties, and names that never train."""
    rng = np.random.default_rng(0)
    names = [None if k == 7 else f"name {k}" for k in rng.zipf(1.6, 900) % 90]
    cuts, counted = [0, 1, 5, 400, 401, 900], []
    for start, end in zip(cuts, cuts[1:]):
        distinct = list(dict.fromkeys(names[start:end]))
        counts = [names[start : min(end, 700)].count(name) for name in distinct]
        counted.append(pl.DataFrame({"name": distinct, "count": counts}))
    expected = ids_slowly(names, 700, *options)
    for size in (0, folder.MERGE_MEMORY + 1):
        _, ids = folder.merged(counted, size, tmp_path / "spilled", *options)
        entries = [name for part in counted for name in part["name"]]
        assert ids.tolist() == [expected[names.index(name)] for name in entries]


def test_columns_that_differ_in_capitals_are_two(tmp_path):
    rows = pl.DataFrame({"Y": [0, 1] * 7, "y": [1, 2] * 7, "a": ["p", "q"] * 7, "A": ["q"] * 14})
    data = preprocess_table(rows, tmp_path / "p", ["y"], ["a", "A"], "Y", progress=False)
    assert data.sparse.tolist() == [[1, 1], [2, 1]] * 7
    assert data.dense[:, 0].tolist() == [1, 2] * 7


def test_csv_and_parquet_of_the_same_rows_are_equal(tmp_path):
    frame = table().with_columns(pl.col("city").replace("", None), pl.col("price").fill_nan(None))
    frame.write_parquet(tmp_path / "t.parquet")
    frame.write_csv(tmp_path / "t.csv")
    made = [preprocess_table(tmp_path / name, tmp_path / f"{name}.p", **COLUMNS, progress=False)
            for name in ("t.parquet", "t.csv")]  # fmt: skip
    for name in ("labels", "dense", "sparse"):
        one, other = (getattr(data, name) for data in made)
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=name == "dense")
    assert torch.equal(made[0].batch(range(700)).dense, made[1].batch(range(700)).dense)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Toy clicks as text, and the same rows as a polars DataFrame read without the module."""
    path = tmp_path_factory.mktemp("tables") / "toy.txt"
    write_toy_criteo(path, 2_000)
    types = dict(zip(NAMES, [pl.Int64] * 14 + [pl.String] * 26, strict=True))
    return path, pl.read_csv(path, separator="\t", has_header=False, schema=types)


def forms(path, frame):
    """The rows in the forms in which people hold them."""
    capitals = {"label": "Label"}
    floats = frame.with_columns(pl.col(INTEGERS).cast(pl.Float64))
    frame.rename(capitals).write_csv(path.with_name("x4.csv"))
    floats.rename({name: name.lower() for name in NAMES}).write_csv(path.with_name("floats.csv"))
    frame.write_csv(path.with_name("header.tsv.csv"), separator="\t")
    frame.write_parquet(path.with_name("ints.parquet"))
    floats.write_parquet(path.with_name("pandas.parquet"))
    return ["x4.csv", "floats.csv", "header.tsv.csv", "ints.parquet", "pandas.parquet"]


def test_text_csv_and_parquet_of_criteo_give_equal_arrays(toy, tmp_path):
    path, frame = toy
    text = preprocess_criteo(path, tmp_path / "text", min_count=2, progress=False)
    lines = path.read_text().splitlines()[:50]
    for name in forms(path, frame):
        data = preprocess_criteo(path.with_name(name), tmp_path / name, 2, progress=False)
        for array in ("labels", "dense", "sparse"):
            one, other = getattr(text, array), getattr(data, array)
            assert one.dtype == other.dtype and np.array_equal(one, other), (name, array)
        batch, expected = data.encode(lines), text.encode(lines)
        assert all(map(torch.equal, batch.indices, expected.indices))
        assert torch.equal(batch.dense, expected.dense)


def test_numbers_as_categories_and_scaled_floats_are_read(toy, tmp_path):
    """As in Criteo_x1: numbers in place of hex digits, fractions in place of counts."""
    _, frame = toy
    number = pl.col(CATEGORIES).str.to_integer(base=16)
    frame.with_columns(number, pl.col(INTEGERS) / 3).write_csv(tmp_path / "x1.csv")
    data = preprocess_criteo(tmp_path / "x1.csv", tmp_path / "p", progress=False)
    assert data.dense.dtype == np.float64
    thirds = frame.select(pl.col(INTEGERS) / 3).fill_null(math.nan).to_numpy()
    assert np.allclose(data.dense, thirds, equal_nan=True)
    assert data.sparse[:, 5].tolist() == ids_slowly(frame["C6"].to_list(), len(data.train))


def test_of_several_files_the_last_is_test_and_validation(toy, tmp_path):
    path, frame = toy
    lines, days = path.read_text().splitlines(keepends=True), []
    for k, (start, end) in enumerate([(0, 900), (900, 1_000), (1_000, 1_701)]):
        days.append(tmp_path / f"day_{k}.gz")
        days[k].write_bytes(gzip.compress("".join(lines[start:end]).encode()))
    data = preprocess_criteo(days, tmp_path / "p", progress=False)
    assert (data.train, data.test, data.validation) == (
        range(1_000), range(1_000, 1_351), range(1_351, 1_701))  # fmt: skip
    assert data.labels.tolist() == frame["label"].to_list()[:1_701]
    assert data.sparse[:, 2].tolist() == ids_slowly(frame["C3"].to_list()[:1_701], 1_000)
    assert data.block_offsets[0] == 0 and data.block_offsets[6:] == [1_000, 1_701]


@pytest.mark.parametrize("damage", ["cut", "absent", "empty", "text cut"])
def test_a_damaged_day_is_named_before_any_work(toy, tmp_path, monkeypatch, damage):
    content = toy[0].read_bytes()
    for k in range(3):
        (tmp_path / f"day_{k}.gz").write_bytes(gzip.compress(content))
    days = [tmp_path / f"day_{k}.gz" for k in range(3)]
    if damage == "cut":
        days[1].write_bytes(days[1].read_bytes()[:-9])
    elif damage == "empty":
        days[1].write_bytes(b"")
    elif damage == "absent":
        days[1].unlink()
    else:
        days[1] = tmp_path / "day_1"
        days[1].write_bytes(content[:-30])
    monkeypatch.setattr(folder, "make", None)
    with pytest.raises((FormatError, FileNotFoundError), match="day_1"):
        preprocess_criteo(days, tmp_path / "p", progress=False)


def test_one_table_needs_seven_rows_and_each_of_several_one(tmp_path):
    for rows in (6, 0):
        with pytest.raises(FormatError, match=f"the frame has {rows} rows; one table needs 7"):
            preprocess_table(table(rows), tmp_path / "p", **COLUMNS, progress=False)
    assert list(tmp_path.iterdir()) == []
    days = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for day in days:
        table(3).write_parquet(day)
    data = preprocess_table(days, tmp_path / "p", **COLUMNS, progress=False)
    assert [*map(len, (data.train, data.test, data.validation))] == [3, 2, 1]


BAD_TABLES = {
    "no such column": (lambda f: f.drop("city"), "no column 'city'"),
    "label 2": (lambda f: f.with_columns(bought=pl.lit(2)), "row 0, column 'bought': 2"),
    "label absent": (lambda f: f.with_columns(bought=pl.lit(None, pl.Int64)), "row 0, .*'bought'"),
    "lists": (lambda f: f.with_columns(city=pl.concat_list("city")), "'city'.* List"),
    "text": (lambda f: f.with_columns(price=pl.lit("dear")), "row 0, column 'price': 'dear'"),
    "infinite": (lambda f: f.with_columns(price=pl.lit(math.inf)), "row 0, .*inf is infinite"),
    "a date": (lambda f: f.with_columns(age=pl.lit("2020-01-01").str.to_date()), "'age'"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_refused_with_row_and_column(tmp_path, name):
    change, message = BAD_TABLES[name]
    with pytest.raises(FormatError, match=message):
        preprocess_table(change(table()), tmp_path / "p", **COLUMNS, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_columns_named_twice_are_refused(tmp_path):
    for dense, categorical in ((["age", "age"], []), ([], ["age", "age"]), (["bought"], [])):
        with pytest.raises(ValueError, match="named twice"):
            preprocess_table(table(), tmp_path / "p", dense, categorical, "bought")
    (tmp_path / "t.csv").write_text("label,a,a\n" + "1,2,3\n" * 9)
    with pytest.raises(FormatError, match="several columns 'a'"):
        preprocess_table(tmp_path / "t.csv", tmp_path / "p", ["a"], [], "label")


@pytest.mark.parametrize("name", ["x.zip", "x.txt", "x.csv", "x.parquet"])
def test_another_kind_of_file_is_named(toy, tmp_path, name):
    shutil.make_archive(tmp_path / "x", "zip", ROOT / "figures")
    path = tmp_path / name
    if name == "x.txt":
        path.write_text("Id,Label," + ",".join(NAMES[1:]) + "\n")
    elif name != "x.zip":
        (tmp_path / "x.zip").rename(path)
    with pytest.raises(FormatError, match=name):
        preprocess_criteo(path, tmp_path / "p", progress=False)


@pytest.mark.parametrize("value", [0, 1.5, True, "2", None])
def test_options_are_checked_first(toy, tmp_path, value):
    with pytest.raises(ValueError, match="min_count is"):
        preprocess_criteo(toy[0], tmp_path / "p", value)
    assert list(tmp_path.iterdir()) == []


def test_the_raw_file_is_no_processed_folder(toy, tmp_path):
    raw = shutil.copy(toy[0], tmp_path / "train.txt.gz")
    with pytest.raises((FormatError, ValueError)) as error:
        preprocess_criteo(toy[0], raw, progress=False)
    assert "is a file" in str(error.value) and "delete" not in str(error.value)


def test_too_many_open_files_is_no_broken_folder(toy, tmp_path, monkeypatch):
    preprocess_criteo(toy[0], tmp_path / "p", progress=False)

    def too_many(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(np.lib.format, "open_memmap", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        load_criteo(tmp_path / "p")


def test_every_changed_byte_of_a_small_file_is_noticed(toy, tmp_path):
    """Also between the 256 pieces that are hashed of a large one."""
    raw = shutil.copy(toy[0], tmp_path / "raw.txt")
    prints = {folder.file_fingerprint(raw)}
    content = bytearray(raw.read_bytes())
    for place in (0, len(content) // 3, len(content) - 9):
        content[place] ^= 1
        raw.write_bytes(content)
        prints.add(folder.file_fingerprint(raw))
    assert len(prints) == 4


def test_every_piece_and_the_time_of_a_large_file_are_noticed(tmp_path, monkeypatch):
    """Its first and last bytes, and 254 places between them: each alone changes the hash."""
    monkeypatch.setattr(folder, "WHOLE_HASH", 1 << 20)
    path = tmp_path / "large"
    size = (1 << 20) + 300 * 4096
    path.write_bytes(bytes(size))
    times, seen = (path.stat().st_atime_ns, path.stat().st_mtime_ns), set()
    places = [0, *((size - 4096) * k // 255 + 4000 for k in range(256)), size - 1]
    for place in places:
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"1")
        os.utime(path, ns=times)
        seen.add(folder.file_fingerprint(path))
    os.utime(path, ns=(times[0], times[1] + 1))
    seen.add(folder.file_fingerprint(path))
    assert len(seen) == len(places) + 1


# ---- The folder's object -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(toy):
    return preprocess_criteo(toy[0], toy[0].with_name("folder"), progress=False)


def test_masks_select_and_fractions_and_rows_outside_are_refused(data):
    mask = data.labels == 1
    assert torch.equal(data.batch(mask).dense, data.batch(np.flatnonzero(mask)).dense)
    assert len(data.batch(slice(3, 9)).labels) == 6 and len(data.batch(-1).labels) == 1
    for wrong in ([0.5, 1.5], [len(data)], [True, False]):
        with pytest.raises(IndexError):
            data.batch(wrong)


def test_it_travels_as_its_path(data):
    sent = pickle.dumps(data)
    assert len(sent) < 1_000 and np.array_equal(pickle.loads(sent).sparse, data.sparse)


def test_single_rows_read_no_more_and_an_epoch_reads_each_run_once(data, monkeypatch):
    read, original = [], type(data).read_ahead
    monkeypatch.setattr(dlrm_utils, "RUN", 50)
    monkeypatch.setattr(dlrm_utils, "RUNS_AT_ONCE", 4)
    monkeypatch.setattr(
        type(data), "read_ahead", lambda self, rows: read.append(rows) or original(self, rows)
    )
    data.batch([3, 900, 1_500])
    assert read == []
    taken = [batch for _, _, batch in shuffled_batches(data.batch, data.train, 33)]
    assert sum(len(batch.labels) for batch in taken) == len(data.train)
    assert sorted(np.concatenate(read).tolist()) == list(data.train)
    whole = list(shuffled_batches(data.batch, data.train, 33, num_epochs=2))
    later = list(shuffled_batches(data.batch, data.train, 33, num_epochs=2, start=60))
    for (step, _, one), (other_step, _, other) in zip(whole[60:], later, strict=True):
        assert step == other_step and torch.equal(one.dense, other.dense)


def test_reading_ahead_starts_where_the_rows_lie(data, monkeypatch):
    """Behind the header of each array: what is read are the bytes of the runs, no others."""
    places = []

    class Watched:
        def __init__(self, path):
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def read(self, size):
            places.append(self.file.read(size))

    monkeypatch.setattr(dlrm_utils, "open", lambda path, *_, **__: Watched(path), raising=False)
    data.read_ahead(range(1024, 1030))
    monkeypatch.undo()
    rows = slice(1024, 2048)
    expected = [np.array(array[rows]).tobytes() for array in (data.labels, data.dense, data.sparse)]
    assert places == expected


def test_stop_at_0_takes_no_step_and_an_empty_batch_is_refused(data):
    assert list(shuffled_batches(data.batch, data.train, 100, stop=0)) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(shuffled_batches(data.batch, data.train, 0))


def test_the_shuffle_keeps_a_ranges_step():
    assert sorted(dlrm_utils.shuffled_rows(range(4, 40, 3), 0).tolist()) == list(range(4, 40, 3))


def test_fingerprints_tell_rows_options_and_names_apart(toy, tmp_path, data):
    other = preprocess_criteo(toy[0], tmp_path / "other", min_count=3, progress=False)
    content = toy[0].read_bytes()
    flipped = b"".join(b"10"[line[0] - 48 :][:1] + line[1:] for line in content.splitlines(True))
    (tmp_path / "flipped.txt").write_bytes(flipped)
    labels = preprocess_criteo(tmp_path / "flipped.txt", tmp_path / "flipped", progress=False)
    assert len({each.fingerprint() for each in (data, other, labels)}) == 3
    assert data.encoder.fingerprint() == labels.encoder.fingerprint()
    assert data.encoder.fingerprint() != other.encoder.fingerprint()


def test_the_encoder_needs_no_folder(toy, tmp_path):
    data = preprocess_criteo(toy[0], tmp_path / "p", progress=False)
    lines = toy[0].read_text().splitlines()[:20]
    expected, fingerprint = data.encode(lines), data.encoder.fingerprint()
    data.encoder.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "p")
    encoder = FrameEncoder.load(tmp_path / "saved")
    assert encoder.table_sizes == data.table_sizes and encoder.fingerprint() == fingerprint
    assert all(map(torch.equal, encoder.encode(lines).indices, expected.indices))
    path = tmp_path / "saved/16-C3.csv"
    path.write_bytes(path.read_bytes()[:-2] + b"0\n")
    with pytest.raises(FormatError, match="C3.csv was changed"):
        FrameEncoder.load(tmp_path / "saved").encode(lines)


@pytest.mark.parametrize("library", [pl.DataFrame, pd.DataFrame])
def test_rows_of_ones_own_are_encoded_as_in_the_folder(tmp_path, library):
    frame = table()
    data = preprocess_table(frame, tmp_path / "p", **COLUMNS, progress=False)
    given = frame if library is pl.DataFrame else pd.DataFrame(frame.to_dict(as_series=False))
    encoded, expected = data.encode(given), data.batch(range(700))
    assert torch.equal(encoded.dense, expected.dense)
    assert all(map(torch.equal, encoded.indices, expected.indices))
    assert torch.equal(encoded.labels, expected.labels)
    assert data.encode(frame.drop("bought")).labels is None
    with pytest.raises(ValueError, match="column 'hour'.* is not a number"):
        data.encode(frame.with_columns(pl.col("hour").cast(pl.String)))
    with pytest.raises(ValueError, match="no column 'city'"):
        data.encode(frame.drop("city"))


# ---- The command ---------------------------------------------------------------------------------


def test_the_command_says_errors_in_one_line(tmp_path, capsys):
    with pytest.raises(
        SystemExit, match="dlrm_utils.py preprocess: .*No such file or directory: 'no'"
    ):
        dlrm_utils.main(["preprocess", "no", str(tmp_path / "p")])
    (tmp_path / "bad.txt").write_text("x\n" * 9)
    with pytest.raises(SystemExit, match="dlrm_utils.py preprocess: .*bad.txt, line 1, column 1"):
        dlrm_utils.main(["preprocess", str(tmp_path / "bad.txt"), str(tmp_path / "p")])
    with pytest.raises(SystemExit):
        dlrm_utils.main(["predict", "m", "in", "out"])
    assert "python dlrm_models.py predict" in capsys.readouterr().err


# Over five seconds: the command imports PyTorch in a process of its own.
@pytest.mark.slow
def test_several_files_by_the_command(toy, tmp_path):
    for k in range(2):
        shutil.copy(toy[0], tmp_path / f"day_{k}")
    command = [sys.executable, str(ROOT / "dlrm_utils.py"), "preprocess", "day_0", "day_1", "p"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "4,000 rows" in done.stdout
    assert len(load_criteo(tmp_path / "p").train) == 2_000
    assert load_criteo(tmp_path / "p").dense.min() == MISSING
