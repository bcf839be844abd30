"""Tables of every form in one normal form, and one encoder: the same ids and numbers everywhere."""

import collections
import csv
import datetime
import decimal
import gzip
import math
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from conftest import ROOT
from data import criteo, files, tables
from data.criteo import CATEGORIES, INTEGERS
from data.encoder import Encoder, Vocabulary
from data.files import FormatError
from dlrm_utils import FrameEncoder

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
        forms = [{"x": [[value] for value in table["x"]]}]
        if isinstance(table, pl.DataFrame):
            forms.append(table.select(pl.concat_list("x")))
        for form in forms:
            assert sorted(bags.arrays(form).ids[0].tolist()) == expected


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_a_csvs_booleans_are_those_of_a_frame(tmp_path, text):
    encoder = Encoder(["new"], ["new"], label="y").fit({"new": [True, True, False], "y": [1, 0, 1]})
    (tmp_path / "t.csv").write_text(f"new,y\n{text},{text}\nfalse,0\n")
    arrays = encoder.arrays(tmp_path / "t.csv")
    assert arrays.ids[0].tolist() == [1, 2] and arrays.labels.tolist() == [1, 0]
    assert np.array_equal(
        arrays.numbers, encoder.arrays({"new": [1, 0]} | {"new": [True, False]}).numbers
    )


# ---- Files -------------------------------------------------------------------------------------

AB = {"categorical": ["a", "b"], "label": "label"}


def read(rows, **options):
    """The names of column a that an encoder finds in all sources."""
    encoder = Encoder(**(AB | options)).fit(rows)
    values = {k + 1: value for k, value in enumerate(encoder.vocabulary("a").values)} | {0: "?"}
    return [values[i] for i in encoder.arrays(rows).ids[0].tolist()]


def text_file(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


INCHES = "label,a,b,unused\n1,p,1,q\n" + '1,q,1,5" x\n1,r,1,7" x\n' + "1,s,1,q\n" * 5
READ = {
    "stray quotation marks in an unused column": (INCHES, "pqr" + "s" * 5),
    "a BOM, CRLF and an empty last line": (b"\xef\xbb\xbflabel,a,b\r\n1,x,2\r\n\r\n", "x"),
    "no newline at the end": ("label,a,b\n1,x,2\n0,y,2", "xy"),
    "a quoted header": ('"label","a","b"\n1,x,2\n', "x"),
    "tabs": ("label\ta\tb\n1\tx,y\t2\n", ["x,y"]),
    "an unused column twice": ("label,q,a,q,b\n1,0,x,0,2\n", "x"),
    "a line break in a name": ('label,a,b\n1,"x\ny, ""z""",1\n0,q,2\n', ['x\ny, "z"', "q"]),
    "spaces, NA and null are texts": ("label,a,b\n1,NA,1\n1, ,1\n0,null,1\n", ["NA", " ", "null"]),
    "missing": ('label,a,b\n1,,1\n0,"",1\n', [None, None]),
}
REFUSED = {
    "a short row": ("label,a,b\n1,x,1\n1,x\n", "row 2: 2 fields, but the header has 3"),
    "a row of its label alone": ("label,a,b\n1,1\n1\n", "row 1: 2 fields"),
    "a long row": ("label,a,b\n1,x,1,\n", "row 1: 4 fields"),
    "an empty line between rows": ("label,a,b\n1,x,1\n\n1,x,1\n", "row 2: 1 fields"),
    "a quotation mark left open": ('label,a,b\n1,x,1\n1,"x,1\n1,y,1\n', "row 2: unexpected end"),
    "text behind a quoted field": ('label,a,b\n1,"x"y,1\n', "row 1: ',' expected"),
    "no UTF-8": (b"label,a,b\n1,x,2\n1,\xff,2\n", "row 2: .*utf-8"),
    "a header alone": ("label,a,b\n", "has a header and no rows"),
    "nothing": ("", "no column 'label'; it has"),
    "no header": (
        "1\t2\t1\n1\t2\t3\n",
        "no column 'label'; .*'2', '1'.: its first line is no header",
    ),
    "a column twice": ("label,a,a,b\n1,x,y,2\n", "several columns 'a'"),
    "an absent column": ("label,b\n1,x\n", "no column 'a'; it has"),
    "no text": (b"PK\0\0", "is no text"),
    "no label": ("label,a,b\n1,x,1\n,x,1\n", "row 2, column 'label': None is neither 0 nor 1"),
    "another label": ("label,a,b\n1,x,1\n2,x,1\n", "row 2, column 'label': 2.0 is neither 0 nor 1"),
}


@pytest.mark.parametrize("piece", [8, 1 << 24])
@pytest.mark.parametrize("case", [*READ, *REFUSED])
def test_every_row_of_a_csv_is_read_or_refused(tmp_path, monkeypatch, case, piece):
    monkeypatch.setattr(files, "PIECE", piece)
    content, expected = (READ | REFUSED)[case]
    path = text_file(tmp_path / "x[1]*?.CSV", content)
    if case in READ:
        assert read(path) == list(expected)
    else:
        with pytest.raises(FormatError, match=rf"x\[1\]\*\?.CSV.*{expected}"):
            read(path)


def test_many_rows_with_inch_marks_are_read(tmp_path):
    rows = "".join(f'1,y{k % 7},1,{k % 9}" x\n' for k in range(20_000))
    names = read(text_file(tmp_path / "t.csv", "label,a,b,u\n" + rows))
    assert names == [f"y{k % 7}" for k in range(20_000)]


def test_no_name_of_a_column_is_a_pattern(tmp_path):
    names = ["a_duplicated_0", "^c.*$", "*", "c1", "a"]
    frame = pl.DataFrame({name: [f"{name} {k}" for k in range(3)] for name in names})
    frame.write_csv(tmp_path / "t*.csv")
    frame.write_parquet(tmp_path / "t*.parquet")
    frame.head(1).write_parquet(tmp_path / "t2.parquet")
    encoder = Encoder(categorical=names[:3]).fit(frame)
    pandas = pd.DataFrame(frame.to_dict(as_series=False))
    for rows in (frame, frame.lazy(), pandas, tmp_path / "t*.csv", tmp_path / "t*.parquet"):
        assert [ids.tolist() for ids in encoder.arrays(rows).ids] == [[1, 2, 3]] * 3
        assert Encoder(categorical=names[:3]).fit(rows).fingerprint() == encoder.fingerprint()
    with pytest.raises(ValueError, match=r"'price' is one name; write \['price'\]"):
        Encoder(dense="price")


def parquet(path, **columns):
    pl.DataFrame({"label": [0, 1], "b": ["x", "y"]} | columns).write_parquet(path)
    return path


def test_a_column_has_one_kind_over_all_files(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", a=[1, 2])
    real = parquet(tmp_path / "real.parquet", a=[1.0, None])
    text = parquet(tmp_path / "text.parquet", a=["1", "2"])
    ms = parquet(tmp_path / "ms.parquet", a=pl.Series([NOON] * 2).cast(pl.Datetime("ms")))
    us = parquet(tmp_path / "us.parquet", a=pl.Series([NOON] * 2))
    table = text_file(tmp_path / "t.csv", "label,a,b\n1,2,x\n0,07,x\n")
    for pair, names in (
        ([real, whole], [1, None, 1, 2]),
        ([whole, table], [1, 2, 2, 7]),
        ([table, whole], [2, 7, 1, 2]),
        ([table, text], ["2", "07", "1", "2"]),
        ([ms, us], [NOON] * 4),
    ):
        assert read(pair) == names
    for pair in ([whole, text], [text, whole], [us, real], [text, table, us]):
        with pytest.raises(FormatError, match=rf"{pair[-1].name}, column 'a': it holds"):
            read(pair)
    encoder = Encoder(**AB).fit(whole)
    with pytest.raises(FormatError, match="text.parquet, row 1, column 'a': '1' is not a number"):
        encoder.arrays(text)
    table.write_text("label,a,b\n1,2,x\n0,two,x\n")
    with pytest.raises(FormatError, match="t.csv, row 2, column 'a': 'two' is not a number"):
        encoder.arrays(table)
    with pytest.raises(FormatError, match="column 'a'.*not texts"):
        Encoder(**AB, kinds={"a": "text"}).fit(whole)


@pytest.mark.parametrize("last", ["header only", "no rows", "absent", "damaged", "another column"])
def test_all_files_are_looked_at_before_one_is_read(tmp_path, monkeypatch, last):
    sound = text_file(tmp_path / "1.csv", "label,a,b\n1,2,x\n")
    bad = tmp_path / ("2.csv" if last in ("header only", "absent") else "2.parquet")
    if last == "header only":
        bad.write_text("label,a,b\n\n")
    elif last == "no rows":
        pl.DataFrame(schema={"label": pl.Int64, "a": pl.String, "b": pl.String}).write_parquet(bad)
    elif last == "damaged":
        bad.write_bytes(parquet(bad, a=["1", "2"]).read_bytes()[:-30])
    elif last == "another column":
        parquet(bad, A=["1", "2"])
    monkeypatch.setattr(pl, "read_csv", None)
    with pytest.raises((FormatError, FileNotFoundError), match=bad.name):
        tables.sources([sound, bad], Encoder(**AB).columns())


NO_NAMES = {
    "a time of day": ([datetime.time(1), None], "datetime.time.* is not a text, number, boolean"),
    "a duration": ([datetime.timedelta(1)], "is not a text, number, boolean or time"),
    "bytes": ([None, b"a"], "row 1, .*b'a' is not a text, number, boolean or time"),
    "a dict": ([{"a": 1}], "row 0, .* is not a text, number, boolean or time"),
    "a huge integer": ([1, 10**400], "row 1, .*is beyond 64 bits"),
    "integers of both ends": ([-1, 2**63 + 1], "row 1, .*is beyond 64 bits"),
    "an integer that a float rounds": ([0.5, 2**53 + 1], "row 1, .*too long among"),
    "an infinite number": ([1.5, math.inf], "row 1, .*inf.* is infinite"),
    "nanoseconds": ([pd.Timestamp("2020-01-01") + pd.Timedelta(1, "ns")], "microsecond|not a text"),
}


@pytest.mark.parametrize("case", NO_NAMES)
def test_what_cannot_be_a_name_is_refused_by_its_column(case):
    values, words = NO_NAMES[case]
    for encoder, given in (
        (Encoder(categorical=["x"]), values),
        (Encoder(multi_hot=["x"]), [[value] for value in values]),
    ):
        with pytest.raises(
            FormatError, match=f"column 'x'.*{words}|{words.replace('row', '.*row')}"
        ):
            encoder.fit({"x": given})


@pytest.mark.parametrize(
    "series",
    [
        pl.Series([datetime.time(1)]),
        pl.Series([datetime.timedelta(1)]),
        pl.Series([b"a"]),
        pl.Series([{"a": 1}]),
        pl.Series([[[1]]]),
        pl.Series([1], dtype=pl.Datetime("ns")),
        pl.Series([2**70], dtype=pl.Int128),
    ],
)
def test_a_type_that_cannot_be_a_name_is_refused_by_its_column(series, tmp_path):
    frame = pl.DataFrame({"x": series})
    for rows in (frame, frame.lazy()):
        for names in ({"categorical": ["x"]}, {"multi_hot": ["x"]}):
            with pytest.raises(FormatError, match="column 'x'"):
                Encoder(**names).fit(rows)


def test_odd_values_that_are_right(tmp_path):
    encoder = Encoder(["n"], ["x"]).fit({"n": [10**20, 0], "x": [decimal.Decimal("sNaN"), 2]})
    assert encoder.vocabulary("x").values == [None, 2]
    assert encoder.arrays({"n": [10**20, None], "x": [None, decimal.Decimal(2)]}).ids[
        0
    ].tolist() == [1, 2]
    with pytest.raises(FormatError, match="row 0, column 'n'"):
        encoder.arrays({"n": 10**400, "x": 2})
    assert len(encoder.arrays([]).numbers) == 0
    Encoder(label="y").fit({"y": [0, 1]}).save(tmp_path / "e")
    assert Encoder.load(tmp_path / "e").arrays({"y": 1}).labels.tolist() == [1]
    with pytest.raises(ValueError, match="'a' stands twice"):
        Vocabulary(["a", "b", "a"])


# ---- Numbers go by name ------------------------------------------------------------------------


def test_the_same_number_in_every_file_and_type_gives_the_same_input(tmp_path):
    """Whole floats are no counts, negative integers no logarithms: what counts is the name."""
    values = [-3, 0, 4, 7]
    frames = [
        pl.DataFrame({"x": pl.Series(values, dtype=dtype), "n": pl.Series(values, dtype=dtype)})
        for dtype in (pl.Int8, pl.Int64, pl.Float32, pl.Float64, pl.Decimal(9, 2))
    ]
    frames[0].write_csv(tmp_path / "t.csv")
    frames[3].write_csv(tmp_path / "floats.csv")
    frames[1].write_parquet(tmp_path / "t.parquet")
    pandas = [pd.DataFrame({"x": values, "n": values}, dtype=t) for t in ("int32", "Int64", object)]
    deviation = np.std(values)
    expected = [[(x - 2) / deviation, math.log1p(max(x, 0))] for x in values]
    paths = [tmp_path / name for name in ("t.csv", "floats.csv", "t.parquet")]
    for rows in (*frames, *pandas, *paths, {"x": values, "n": values}):
        encoder = Encoder(dense=["x"], counts=["n"]).fit(rows)
        assert np.allclose(encoder.arrays(rows).numbers, expected, atol=1e-6)
        assert np.allclose(
            encoder.arrays({"x": 2.5, "n": 2.5}).numbers, [[0.5 / deviation, math.log(3.5)]]
        )


def test_one_fraction_changes_no_other_row():
    whole = pl.DataFrame({"x": [float(k) for k in range(1000)], "n": [1.0] * 1000})
    one = whole.with_columns(n=pl.when(pl.col("x") == 7).then(5.5).otherwise("n"))
    encoder = Encoder(dense=["x"], counts=["n"])
    first, second = (encoder.fit(rows).arrays(rows).numbers for rows in (whole, one))
    assert np.array_equal(np.delete(first, 7, axis=0), np.delete(second, 7, axis=0))


def test_what_leaves_float32_is_refused_by_its_row_after_the_scaling(tmp_path):
    encoder = Encoder(["x"], counts=["n"]).fit({"x": [1e-30, 3e-30], "n": [0, 1]})
    with pytest.raises(
        FormatError, match="the frame, row 1, column 'x': 10000000000.0 is too large"
    ):
        encoder.arrays({"x": [1e-30, 1e10], "n": [0, 0]})
    text_file(tmp_path / "t.csv", "x,n\n1e-30,1\n1e-30,2\n1e10,3\n")
    with pytest.raises(FormatError, match="t.csv, row 3, column 'x': 10000000000.0"):
        encoder.arrays(tmp_path / "t.csv")
    assert encoder.arrays({"x": 2e-30, "n": 1e300}).numbers.tolist() == [
        [0, pytest.approx(690.7755)]
    ]
    with pytest.raises(FormatError, match="column 'x': its numbers are too large to be scaled"):
        Encoder(["x"]).fit({"x": [1e308, -1e308, 1e308]})


def test_a_row_is_numbered_from_the_start_of_its_table_not_of_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1)
    monkeypatch.setattr(tables, "PIECE_ROWS", 1)
    encoder = Encoder(["x"]).fit({"x": [0.0, 1.0]})
    frame = pl.DataFrame({"x": [0.0, 1.0, 2.0, math.inf]})
    frame.write_csv(tmp_path / "t.csv")
    frame.write_parquet(tmp_path / "t.parquet")
    for rows, row in ((tmp_path / "t.csv", 4), (tmp_path / "t.parquet", 4), (frame, 3)):
        with pytest.raises(FormatError, match=f"row {row}, column 'x': inf is infinite"):
            encoder.arrays(rows)


@pytest.mark.parametrize("size", [1, 7, 500])
def test_scales_do_not_depend_on_how_rows_are_cut(size, monkeypatch):
    rng = np.random.default_rng(0)
    rows = pl.DataFrame({"x": rng.normal(1e6, 1, 900), "y": rng.random(900)})
    whole = Encoder(["x", "y"]).fit(rows)
    monkeypatch.setattr(tables, "PIECE_ROWS", size)
    assert Encoder(["x", "y"]).fit(rows).scales == whole.scales
    assert np.allclose(whole.scales[0], [rows["x"].mean(), rows["x"].std(ddof=0)], rtol=1e-12)


# ---- Criteo ------------------------------------------------------------------------------------


def criteo_line(label=1, number=5, name="0000ab19"):
    return "\t".join(map(str, [label, *[number] * 13, *[name] * 26]))


def criteo_encoder(rows):
    """An encoder of Criteo's columns, fitted on files or a frame."""
    encoder = FrameEncoder([], CATEGORIES, [], "label", counts=INTEGERS).fit(rows)
    return encoder, [i for piece in encoder.pieces(rows) for i in piece.ids[0].tolist()]


COLUMNS = ["label", *INTEGERS, *CATEGORIES]


def as_csv(lines, capitals=str):
    return "\n".join(
        [",".join(map(capitals, COLUMNS)), *(line.replace("\t", ",") for line in lines)]
    )


@pytest.mark.parametrize("order", [1, -1])
def test_text_and_table_of_criteo_together_give_the_same_ids(tmp_path, order):
    lines = [criteo_line(name=name) for name in ("0000ab19", "0000AB20", "", "0000ab19")]
    paths = [
        text_file(tmp_path / "d.CSV", as_csv(lines, str.lower) + "\n"),
        text_file(tmp_path / "d.txt", "\n".join(lines)),
    ][::order]
    encoder, ids = criteo_encoder(paths)
    assert ids == [1, 2, 3, 1] * 2
    assert encoder.names("C1").to_list() == ["0000ab19", "0000ab20", None]
    assert encoder.transform(lines).indices[0].tolist() == [1, 2, 3, 1]
    frame = pl.read_csv(paths[0], infer_schema=False) if order == 1 else pl.DataFrame(
        [line.split("\t") for line in lines], COLUMNS, orient="row")  # fmt: skip
    frame = frame.with_columns(pl.col("^(?i)(label|i.*)$").cast(pl.Int64))
    assert encoder.transform(frame).indices[0].tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("cut", [5, 60])
def test_a_cut_criteo_table_is_refused_with_its_row(tmp_path, cut):
    for name in ("0000ab19", "00000019", "12345678"):
        lines = [criteo_line(name=name).replace(name, "0000ab19", 1)] * 8
        text_file(tmp_path / "d.csv", as_csv(lines)[:-cut])
        with pytest.raises(FormatError, match="d.csv, row 8"):
            criteo_encoder(tmp_path / "d.csv")
        text_file(tmp_path / "d.txt", "\n".join(lines)[:-cut])
        with pytest.raises(FormatError, match="d.txt, line 8"):
            criteo_encoder(tmp_path / "d.txt")


def test_criteos_categories_as_numbers_are_whole_or_missing(tmp_path):
    numbers = {"label": [0, 1, 1], **dict.fromkeys(INTEGERS, [1, 2, 3])}
    frame = pl.DataFrame(numbers | dict.fromkeys(CATEGORIES, [5.0, math.nan, 7.0]))
    frame.write_parquet(tmp_path / "floats.parquet")
    encoder, ids = criteo_encoder(tmp_path / "floats.parquet")
    assert ids == [1, 2, 3] and encoder.vocabulary("C1").values == [5, None, 7]
    frame.with_columns(C3=pl.Series([1.0, 1.2, 1.7])).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(FormatError, match="bad.parquet, row 2, column 'C3': 1.2 is not a whole"):
        criteo_encoder(tmp_path / "bad.parquet")
    with pytest.raises(FormatError, match="row 1, column 'C3': 1.2 is not a whole number"):
        encoder.transform(frame.with_columns(C3=pl.Series([1.0, 1.2, 1.7])))
    with pytest.raises(ValueError, match="raw lines hold texts"):
        encoder.transform(criteo_line())


def test_an_empty_text_in_a_criteo_table_is_a_missing_category(tmp_path):
    frame = pl.DataFrame({"label": [0, 1], **dict.fromkeys(INTEGERS, [1, None]),
                          **dict.fromkeys(CATEGORIES, ["", None])})  # fmt: skip
    frame.write_parquet(tmp_path / "t.parquet")
    encoder, ids = criteo_encoder(tmp_path / "t.parquet")
    assert ids == [1, 1] and encoder.names("C1").to_list() == [None]
    assert encoder.transform(criteo_line(name="")).indices[0].tolist() == [1]


@pytest.mark.parametrize("how", ["plain", "GZ", "tar.gz", "TGZ"])
def test_criteos_text_is_read_packed_or_not_with_a_bom_or_not(tmp_path, how):
    text = ("\n".join([criteo_line(), criteo_line(0, 7)]) + "\n").encode()
    if how == "plain":
        path = text_file(tmp_path / "train.txt", b"\xef\xbb\xbf" + text)
    elif how == "GZ":
        path = text_file(tmp_path / "train.txt.GZ", gzip.compress(text))
    else:
        path = tmp_path / f"dac.{how}"
        with tarfile.open(path, "w:gz") as archive:
            (tmp_path / "folder").mkdir()
            archive.add(tmp_path / "folder", "train.txt")  # a folder of that name is passed over
            archive.add(text_file(tmp_path / "x", text), "dac/train.txt")
    frame = pl.concat(criteo.frames(path))
    assert frame["label"].to_list() == [1, 0] and frame["I3"].to_list() == [5, 7]
    criteo.check_end(path)
    if how == "TGZ":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "folder", "train.txt")
        with pytest.raises(FormatError, match="holds no file train.txt"):
            list(criteo.frames(path))


def test_ten_digits_are_read_at_speed_and_too_many_are_named(monkeypatch):
    """The reader of one line, which is slow, isn't called for them."""
    read_line = criteo.read_line
    monkeypatch.setattr(criteo, "read_line", None)
    numbers = [2**31 - 1, 1 - 2**31, "0000000012", "-0", "007"]
    text = "".join(criteo_line(number=number) + "\n" for number in numbers).encode()
    assert criteo.parsed(text, "x")["I13"].to_list() == [int(number) for number in numbers]
    monkeypatch.setattr(criteo, "read_line", read_line)
    for number in (2**31, -(2**31), 10**10 - 1):
        bad = text + criteo_line(number=number).encode() + b"\n"
        with pytest.raises(FormatError, match=rf"x, line 6, column 2 \(I1\): '{number}' is not"):
            criteo.parsed(bad, "x")


@pytest.mark.parametrize("lines", [3, 100])
def test_a_bad_field_without_labels_has_its_own_column(lines):
    """One line is read by another reader than many: both say the same."""
    fields = pl.DataFrame([criteo_line().split("\t")] * 2, COLUMNS, orient="row")
    encoder, _ = criteo_encoder(fields.with_columns(pl.col("label", *INTEGERS).cast(pl.Int64)))
    good = criteo_line()
    unlabelled = good.split("\t", 1)[1]
    for first, bad, column in (
        (good, criteo_line(name="0000xb19"), r"15 \(C1\)"),
        (unlabelled, unlabelled.replace("0000ab19", "0000xb19"), r"14 \(C1\)"),
        (unlabelled, unlabelled.replace("5", "x"), r"1 \(I1\)"),
        (unlabelled, good, "39"),
    ):
        with pytest.raises(FormatError, match=f"lines, line {lines}, column {column}"):
            encoder.transform([first] * (lines - 1) + [bad])
    several = [[good] * lines, [good.encode()] * lines, f"{good}\r\n" * lines]
    batches = map(encoder.transform, [*several, "\n".join([good] * lines)])
    for batch in batches:
        assert len(batch.dense) == lines and batch.indices[3].tolist() == [1] * lines
        assert batch.labels.tolist() == [1] * lines
    assert encoder.transform([unlabelled] * lines).labels is None
    assert encoder.transform([]).dense.shape == (0, 13)


@pytest.mark.parametrize("label", [None, "clicked"])
@pytest.mark.parametrize("how", ["welcome", "unread"])
def test_the_label_of_text_is_read_where_it_is_wanted(tmp_path, label, how):
    lines = [criteo_line(k % 2) for k in range(100)]
    path = text_file(tmp_path / "t.txt", "\n".join(lines))
    unlabelled = text_file(tmp_path / "u.txt", "\n".join(x.split("\t", 1)[1] for x in lines))
    encoder = FrameEncoder([], CATEGORIES, label=label, counts=INTEGERS)
    names = dict.fromkeys(CATEGORIES, pl.Series(["0000ab19"]))
    encoder.set_fitted(dict.fromkeys(CATEGORIES, "text"), [], names)
    for rows in (path, unlabelled, lines, lines[:3]):
        (batch,) = encoder.batches(rows, how)
        assert batch.indices[25].tolist() == [1] * len(batch.dense)
        wanted = label and how == "welcome" and rows != unlabelled
        found = None if batch.labels is None else batch.labels.tolist()
        if not isinstance(rows, list) or how == "welcome":
            assert found == ([k % 2 for k in range(len(batch.dense))] if wanted else None)


def test_the_rooms_need_no_torch_and_no_other_data_folder_disturbs(tmp_path):
    (tmp_path / "data").mkdir()
    text_file(tmp_path / "data/__init__.py", "raise ImportError('the other one')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from data import criteo, encoder, folder; "
    code += "print(criteo.__file__.startswith(sys.argv[1]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


# ---- Whole files -------------------------------------------------------------------------------


def test_two_that_write_one_file_leave_the_one_or_the_other(tmp_path):
    path = tmp_path / "f"
    with files.replacing(path) as one:
        one.write_text("one" * 1000)
        with files.replacing(path) as other:
            assert one != other
            other.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" * 1000 and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "one" * 1000 and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_going_on(tmp_path, monkeypatch):
    """In that order: the file's bytes, its new name, the folder that holds the name."""
    done, fsync, replace = [], os.fsync, os.replace
    names = {}

    def opened(path, *arguments, open=os.open):
        descriptor = open(path, *arguments)
        names[descriptor] = Path(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: done.append(names[descriptor]) or fsync(descriptor)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("renamed") or replace(a, b))
    with files.replacing(tmp_path / "deep/f") as temporary:
        temporary.write_text("content")
    assert done == [temporary, "renamed", tmp_path / "deep"]


def test_the_second_process_waits_and_says_for_what(tmp_path, capsys):
    events = []

    def second():
        with files.waiting_lock(tmp_path / "lock", "the folder p"):
            events.append("second")

    with files.waiting_lock(tmp_path / "lock", "the folder p"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        events.append("first")
    thread.join()
    assert events == ["first", "second"]
    assert "waiting for another process: the folder p" in capsys.readouterr().err
