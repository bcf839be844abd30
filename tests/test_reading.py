"""Tables of every form in one normal form, and one encoder: the same ids and numbers everywhere."""

import collections
import csv
import datetime
import decimal
import math

import numpy as np
import pandas as pd
import polars as pl
import pytest

from data import files, tables
from data.encoder import Encoder
from data.files import FormatError

UTC = datetime.UTC
ROWS = 60


def every_kind(rows=ROWS):
    """A table of every kind of column as Python's values, some missing, some rare."""
    day = datetime.date(2020, 1, 1)
    noon = datetime.datetime(2020, 1, 1, 12)
    names = ["Rome", None, 'a, "b"', "007", "7", " x ", "line\nbreak", "Ürümqi", '5" x']
    return {
        "label": [k % 2 for k in range(rows)],
        "price": [None if k % 7 == 0 else k * 0.37 - 5 for k in range(rows)],
        "whole": [None if k % 9 == 0 else float(k) for k in range(rows)],
        "visits": [None if k % 5 == 0 else k * k - 3 for k in range(rows)],
        "city": [names[k * k % 9] for k in range(rows)],
        "hour": [None if k % 11 == 0 else 14_102_100 + k % 6 for k in range(rows)],
        "large": [2**53 + k % 3 for k in range(rows)],
        "share": [[0.1, 0.25, None, 2.0][k % 4] for k in range(rows)],
        "new": [[True, False, None][k % 3] for k in range(rows)],
        "day": [None if k % 13 == 0 else day + datetime.timedelta(k % 5) for k in range(rows)],
        "time": [noon + datetime.timedelta(microseconds=k % 4) for k in range(rows)],
        "tags": [[["x", "y"], [], None, ["z", "x", None]][k % 4] for k in range(rows)],
    }


NAMES = {"dense": ["price", "whole"], "counts": ["visits"], "multi_hot": ["tags"], "label": "label"}
NAMES["categorical"] = ["city", "hour", "large", "share", "new", "day", "time"]
KINDS = {"hour": "number", "large": "number", "share": "number", "new": "boolean"}
KINDS |= {"day": "time", "time": "time"}


def slowly(table, min_count=1, max_rows=None):
    """What the encoder should say, value by value: numbers, ids of each table, lengths."""
    numbers = []
    for name in NAMES["dense"]:
        found = [x for x in table[name] if x is not None]
        mean = math.fsum(found) / len(found)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in found) / len(found))
        numbers.append([0 if x is None else (x - mean) / deviation for x in table[name]])
    numbers.append([0 if x is None else math.log1p(max(x, 0)) for x in table["visits"]])
    ids = []
    for name in [*NAMES["categorical"], "tags"]:
        values = table[name]
        if name == "tags":
            values = [value for bag in values for value in bag or []]
        counts = collections.Counter(values)
        kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: -counts[v])
        known = {v: k for k, v in enumerate(kept[: None if max_rows is None else max_rows - 1], 1)}
        ids.append([known.get(value, 0) for value in values])
    return np.array(numbers).T, ids, [len(bag or []) for bag in table["tags"]]


def check(arrays, expected, bags=True):
    numbers, ids, lengths = expected
    assert arrays.numbers.dtype == np.float32 and np.allclose(arrays.numbers, numbers, atol=1e-5)
    assert [found.tolist() for found in arrays.ids] == ids[: None if bags else -1]
    if bags:
        assert arrays.lengths[-1].tolist() == lengths
    assert arrays.labels.tolist() == [k % 2 for k in range(len(numbers))]


def forms(table, folder):
    """The same table in all forms in which people hold one."""
    frame = pl.DataFrame(table)
    pandas = pd.DataFrame({n: pd.Series(v, dtype=object) for n, v in table.items()})
    frame.write_parquet(folder / "t.PARQUET")
    half = folder / "half.parquet", folder / "rest.parquet"
    frame[:25].write_parquet(half[0])
    frame[25:].with_columns(pl.col("hour").cast(pl.Float64)).write_parquet(half[1])
    return {
        "polars": frame,
        "lazy": frame.lazy(),
        "pandas objects": pandas,
        "pandas": pandas.assign(
            **{n: pd.Series(table[n]) for n in ("price", "whole", "visits", "hour", "large")},
            day=pd.to_datetime(pd.Series(table["day"])),
            time=pd.Series(
                pd.DatetimeIndex(table["time"]).tz_localize("UTC").tz_convert("Asia/Tokyo")
            ),
            city=pd.Series(table["city"], dtype="category"),
            new=pd.Series(table["new"], dtype="boolean"),
        ),
        "dict": table,
        "rows": frame.to_dicts(),
        "parquet": folder / "t.PARQUET",
        "two files": list(half),
    }


@pytest.mark.parametrize("options", [{}, {"min_count": 9}, {"max_table_rows": 3}])
def test_every_form_of_a_table_gives_the_same_numbers_and_ids(tmp_path, options, monkeypatch):
    monkeypatch.setattr(tables, "PIECE_ROWS", 17)
    table = every_kind()
    expected = slowly(table, options.get("min_count", 1), options.get("max_table_rows"))
    given = forms(table, tmp_path)
    one = Encoder(**NAMES, **options).fit(given["polars"])
    for form, rows in given.items():
        own = Encoder(**NAMES, **options).fit(rows)
        check(one.arrays(rows), expected), form
        check(own.arrays(given["dict"]), expected)
        assert own.fingerprint() == one.fingerprint(), form
    one.save(tmp_path / "saved")
    check(Encoder.load(tmp_path / "saved").arrays(given["lazy"]), expected)


def written(table, path, how):
    """The table without its lists as CSV, by one of three writers."""
    plain = {name: values for name, values in table.items() if name != "tags"}
    if how == "polars":
        pl.DataFrame(plain).write_csv(path)
    elif how == "pandas":
        objects = {n: pd.Series(v, dtype=object) for n, v in plain.items()}
        pd.DataFrame(objects).to_csv(path, index=False)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([plain, *zip(*plain.values())])
    return path


@pytest.mark.parametrize("piece", [100, 1 << 24])
@pytest.mark.parametrize("how", ["polars", "pandas", "csv"])
def test_a_csv_gives_the_same_once_it_is_said_what_its_columns_are(
    tmp_path, monkeypatch, how, piece
):
    """A name with a line break may begin in one piece of the file and end in another."""
    monkeypatch.setattr(files, "PIECE", piece)
    table = every_kind()
    names = {**NAMES, "multi_hot": []}
    path = written(table, tmp_path / "t.CSV", how)
    one = Encoder(**names).fit(pl.DataFrame(table))
    check(one.arrays(path), slowly(table), bags=False)
    own = Encoder(**names, kinds=KINDS).fit(path)
    check(own.arrays(table), slowly(table), bags=False)
    assert own.fingerprint() == one.fingerprint()


def test_a_csv_alone_makes_names_texts(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n007,1.0\n7,1\n,1\n")
    encoder = Encoder(categorical=["a", "b"]).fit(tmp_path / "t.csv")
    assert encoder.kinds == {"a": "text", "b": "text"}
    assert encoder.names("a").to_list() == ["007", "7", None]
    assert encoder.names("b").to_list() == ["1", "1.0"]
    with pytest.raises(FormatError, match="the frame, row 0, column 'b': 1 is not a text"):
        encoder.arrays({"a": "7", "b": 1})


def test_one_row_of_any_kind_is_encoded_as_in_the_table():
    table = every_kind()
    encoder = Encoder(**NAMES).fit(table)
    whole = encoder.arrays(table)
    pandas = pd.DataFrame({n: pd.Series(v, dtype=object) for n, v in table.items()})
    starts = np.cumsum([0, *whole.lengths[-1]])
    for k in range(0, ROWS, 7):
        row = {name: values[k] for name, values in table.items()}
        for form in (row, pandas.iloc[k], [row], pandas.iloc[[k]]):
            arrays = encoder.arrays(form)
            assert np.array_equal(arrays.numbers, whole.numbers[[k]])
            assert [ids.tolist() for ids in arrays.ids[:-1]] == [[ids[k]] for ids in whole.ids[:-1]]
            assert arrays.ids[-1].tolist() == whole.ids[-1][starts[k] : starts[k + 1]].tolist()


# ---- Names that are equal, whatever their type ---------------------------------------------------

NOON = datetime.datetime(2020, 1, 1, 12)
SAME = {
    "ms and us": (pl.Series([NOON]).cast(pl.Datetime("ms")), pl.Series([NOON])),
    "ns and us": (pl.Series([NOON]).cast(pl.Datetime("ns")), pl.Series([NOON])),
    "a day and its midnight": (
        pl.Series([datetime.date(2020, 1, 1)]), pl.Series([datetime.datetime(2020, 1, 1)])),
    "UTC and Rome": (
        pl.Series([NOON]).dt.replace_time_zone("UTC"),
        pl.Series([NOON]).dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Rome")),
    "naive and UTC": (pl.Series([NOON]), pd.Series([pd.Timestamp(NOON, tz="UTC")])),
    "Python's and NumPy's time": ([NOON], np.array(["2020-01-01T12"], dtype="M8[s]")),
    "integers and reals": (pl.Series([0, 1, 2]), pl.Series([0.0, 1.0, 2.0])),
    "small and unsigned": (pl.Series([3], dtype=pl.UInt8), pl.Series([3], dtype=pl.Int64)),
    "float32 and float64": (pl.Series([0.1], dtype=pl.Float32), pl.Series([0.1])),
    "float32 and itself widened": (
        pl.Series([0.1], dtype=pl.Float32), pl.Series([0.1], dtype=pl.Float32).cast(pl.Float64)),
    "decimals": (pl.Series([decimal.Decimal("2.50")]), pl.Series([2.5])),
    "whole decimals": ([decimal.Decimal("3.0")], [3]),
    "minus zero": ([0.0], [-0.0]),
    "an unsigned one that no Int64 holds": (pl.Series([2**63 + 2048], dtype=pl.UInt64),
                                            [float(2**63 + 2048)]),
    "categories and texts": (pl.Series(["a"], dtype=pl.Categorical), pd.Series(["a"])),
    "NumPy's text": ([np.str_("a")], ["a"]),
    "booleans": (pl.Series([True, False]), pd.Series([True, False], dtype="boolean")),
    "an empty text and a missing one": (pl.Series(["", "a"]), [None, "a"]),
    "NaN and missing": (pl.Series([math.nan, 1.5]), [None, 1.5]),
}  # fmt: skip
DIFFERENT = {
    "an integer and the float nearest to it": ([2**53 + 1], [float(2**53)]),
    "large unsigned ones": (pl.Series([2**63 + 5], dtype=pl.UInt64), [2**63 + 6]),
    "an unsigned one and the same bits signed": (pl.Series([2**64 - 1], dtype=pl.UInt64), [-1]),
    "microseconds": ([NOON], [NOON + datetime.timedelta(microseconds=1)]),
    "texts of numbers": (["7"], ["7.0"]),
}


@pytest.mark.parametrize("case", [*SAME, *DIFFERENT])
def test_names_are_compared_in_normal_form(case, tmp_path):
    """Each is fitted on, and the other has the same ids or, where it is another name, none."""
    one, other = (SAME | DIFFERENT)[case]
    for fitted, given in ((one, other), (other, one)):
        as_table = (pl.DataFrame if isinstance(fitted, pl.Series) else pd.DataFrame)({"x": fitted})
        encoder = Encoder(categorical=["x"]).fit(as_table)
        encoder.save(tmp_path / "e")
        expected = [1, 2, 3][: len(given)] if case in SAME else [0]
        table = (pl.DataFrame if isinstance(given, pl.Series) else pd.DataFrame)({"x": given})
        for ours in (encoder, Encoder.load(tmp_path / "e")):
            assert sorted(ours.arrays(table).ids[0].tolist()) == expected
        bags = Encoder(multi_hot=["x"]).fit({"x": [[value] for value in as_table["x"]]})
        found = bags.arrays({"x": [[value] for value in table["x"]]}).ids[0].tolist()
        assert sorted(found) == expected


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_a_csvs_booleans_are_those_of_a_frame(tmp_path, text):
    encoder = Encoder(["new"], ["new"], label="y").fit({"new": [True, True, False], "y": [1, 0, 1]})
    (tmp_path / "t.csv").write_text(f"new,y\n{text},{text}\nfalse,0\n")
    arrays = encoder.arrays(tmp_path / "t.csv")
    assert arrays.ids[0].tolist() == [1, 2] and arrays.labels.tolist() == [1, 0]
    assert np.array_equal(
        arrays.numbers, encoder.arrays({"new": [1, 0]} | {"new": [True, False]}).numbers
    )
