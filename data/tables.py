"""Tables of any kind in one normal form, piece by piece; a wrong row, column and file named.

Normal form: a column holds numbers (Int64, UInt64 or Float64), texts, booleans, times (UTC, in
microseconds), or lists of these; a missing value and an empty text are null. A CSV has no kinds:
its texts are read as the kind that is asked for.
"""

import contextlib
import csv
import datetime
import decimal
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl

from data import files
from data.files import FormatError

PIECE_ROWS = 1 << 17  # rows of a parquet or a frame that are handled together
DTYPES = {"text": pl.String, "number": pl.Float64, "boolean": pl.Boolean, "time": pl.Datetime("us")}
KINDS = list(DTYPES)
NO_KIND = "not a text, number, boolean or time"
LISTS = (list, tuple, np.ndarray, pd.Series, pl.Series)


class Column(NamedTuple):
    """A column that is wanted; of name None it is not looked for, optional: it may be absent.

    measure: a number that the model reads, or a label; true counts 1, and all becomes Float64.
    bag: a list a row. kind: text, number, boolean or time, None as long as nothing is known.
    """

    name: str | int | None
    measure: bool = False
    bag: bool = False
    kind: str | None = None
    optional: bool = False


class Piece(NamedTuple):
    """Some rows in normal form: of column k of `columns`, the frame's column str(k).

    place: the file's path, or "the frame"; row: the number of the first row, which a file counts
    from 1 and a frame from 0.
    """

    frame: pl.DataFrame
    columns: list
    place: object
    row: int

    def refuse(self, k, wrong, what):
        """FormatError for the first row that the mask `wrong` (B,) marks, if there is one."""
        rows = pl.Series(wrong).arg_true()
        if len(rows):
            value = self.frame[str(k)][rows[0]]
            raise refused(self.place, self.row + rows[0], self.columns[k].name, value, what)


def refused(place, row, name, value, what):
    """The FormatError of one value."""
    value = value.to_list() if isinstance(value, pl.Series) else value
    return FormatError(f"{place}, row {row}, column {name!r}: {value!r:.60} is {what}")


class Source(NamedTuple):
    """A table whose rows are not read yet.

    empty: a frame without rows, its columns named by place; read: a function that gives such
    frames with rows, in order. typed: False where texts stand for anything, as in a CSV.
    """

    place: object
    empty: pl.DataFrame
    read: Callable
    first_row: int = 1
    typed: bool = True

    def pieces(self, columns):
        """All rows in order, at least one `Piece`; of the kinds that `columns` want."""
        row = self.first_row
        for frame in self._frames():
            raw = Piece(frame, columns, self.place, row)
            made = {name: _normal(raw, int(name), self.typed) for name in frame.columns}
            yield raw._replace(frame=pl.DataFrame(made))
            row += len(frame)

    def _frames(self):
        with files.damage_named(self.place):
            frames = iter(self.read())
            yield next(frames, self.empty)
            yield from frames


def agreed(columns, tables):
    """The columns with the one kind that all sources have; text where there are CSVs alone."""
    kinds = [column.kind for column in columns]
    for k, column in enumerate(columns):
        for table in () if column.measure else tables:
            found = _kind(table.empty[str(k)].dtype) if table.typed else None
            if found and kinds[k] not in (None, found):
                what = f"it holds {found}s, not {kinds[k]}s as wanted or as in another file"
                raise FormatError(f"{table.place}, column {column.name!r}: {what}")
            kinds[k] = kinds[k] or found
        if not (column.measure or kinds[k] or all(table.typed for table in tables)):
            kinds[k] = "text"
    return [column._replace(kind=kind) for column, kind in zip(columns, kinds)]


# ---- What rows can be ----------------------------------------------------------------------------


def sources(rows, columns, any_capitals=False):
    """A `Source` for each file, or one for what lies in memory; all headers are looked at now.

    rows: a path or several, .parquet or else CSV; a frame of pandas or polars, a LazyFrame; a dict
    or a Series (one row), a dict of lists, a list of dicts. any_capitals: names in any capitals.
    """
    rows = [rows] if isinstance(rows, str | Path) else rows
    if isinstance(rows, list | tuple) and rows and all(isinstance(r, str | Path) for r in rows):
        return [_file(Path(path), columns, any_capitals) for path in rows]
    if isinstance(rows, dict | pd.Series):
        rows = _dict(dict(rows), columns)
    elif isinstance(rows, list | tuple) and all(isinstance(row, dict) for row in rows):
        names = list(dict.fromkeys(itertools.chain(*rows))) or [column.name for column in columns]
        rows = pd.DataFrame({name: _objects([row.get(name) for row in rows]) for name in names})
    if isinstance(rows, pl.LazyFrame):
        return [_scanned(rows, "the frame", 0, columns, any_capitals)]
    if not isinstance(rows, pd.DataFrame | pl.DataFrame):
        known = "a DataFrame, a LazyFrame, a dict, a list of dicts, or a path"
        raise FormatError(f"rows are {known}, not {type(rows).__name__}")
    places = _places(list(rows.columns), columns, "the frame", any_capitals)
    at = rows.to_series if isinstance(rows, pl.DataFrame) else lambda p: rows.iloc[:, p]
    frame = pl.DataFrame({str(k): _series(at(p), columns[k]) for k, p in places.items()})
    read = functools.partial(frame.iter_slices, PIECE_ROWS)
    return [_checked(Source("the frame", frame.clear(), read, first_row=0), columns)]


def _places(names, columns, place, any_capitals=False):
    """{k of columns: where its name stands}; FormatError for one that is absent, or there twice."""
    plain = (lambda name: str(name).lower()) if any_capitals else str
    places = {}
    for k, column in enumerate(columns):
        if column.name is None:
            continue
        at = [p for p, name in enumerate(names) if plain(name) == plain(column.name)]
        if len(at) == 1:
            places[k] = at[0]
        elif at or not column.optional:
            what = "several columns" if at else "no column"
            found = f"{place} has {what} {column.name!r}; it has {names}"
            known = {plain(other.name) for other in columns} & {*map(plain, names)}
            hint = "" if known or place == "the frame" else ": its first line is no header"
            raise FormatError(found + hint)
    return places


def _scanned(table, place, first_row, columns, any_capitals):
    """The source of a LazyFrame."""
    places = _places(list(table.collect_schema()), columns, place, any_capitals)
    picked = table.select(pl.nth(p).alias(str(k)) for k, p in places.items())
    read = functools.partial(picked.collect_batches, chunk_size=PIECE_ROWS, maintain_order=True)
    empty = pl.DataFrame(schema=picked.collect_schema())
    return _checked(Source(place, empty, read, first_row), columns)


def _checked(source, columns):
    """The source, if each of its columns is of some kind, and holds lists where they are wanted."""
    for name, dtype in source.empty.schema.items():
        column, listed = columns[int(name)], isinstance(dtype, pl.List | pl.Array)
        if _kind(dtype) == "other" or (dtype != pl.Null and listed != column.bag):
            wanted = "not lists" if column.bag else "not single values"
            found = f"it holds {dtype}, {NO_KIND if listed == column.bag else wanted}"
            raise FormatError(f"{source.place}, column {column.name!r}: {found}")
    return source


def _file(path, columns, any_capitals):
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() == ".parquet":
        with files.damage_named(path):
            table = pl.scan_parquet(path, glob=False)
            source = _scanned(table, path, 1, columns, any_capitals)
            rows = table.select(pl.len()).collect().item()
    else:
        with open(path, "rb") as file:
            names, separator = _header(file, path)
            rows = len(file.read(1 << 16).strip(b"\r\n")) or len(names) == 1
        places = _places(names, columns, path, any_capitals)
        empty = pl.DataFrame(schema={str(k): pl.String for k in places})
        read = functools.partial(_csv, path, places, separator, len(names))
        source = Source(path, empty, read, typed=False)
    if not rows:
        raise FormatError(f"{path} has a header and no rows")
    return source


def _dict(rows, columns):
    """One row, or a frame if its values are lists, of bags lists of lists."""
    wanted = {str(column.name).lower() for column in columns}
    rows = {name: value for name, value in rows.items() if str(name).lower() in wanted}
    bags = {column.name for column in columns if column.bag}
    single = [isinstance(value, LISTS) for name, value in rows.items() if name not in bags]
    inner = [bag for name in rows.keys() & bags for bag in rows[name] or ()]
    many = any(single) if single else all(isinstance(bag, (*LISTS, type(None))) for bag in inner)
    return pd.DataFrame({n: _objects(list(v) if many else [v]) for n, v in rows.items()})


def _objects(values):
    """A NumPy array of Python's objects, lists among them."""
    objects = np.empty(len(values), dtype=object)
    for k, value in enumerate(values):
        objects[k] = value
    return objects


# ---- Normal form ---------------------------------------------------------------------------------


def _kind(dtype):
    """The kind of a column, or of its lists' values; None if all are missing; or "other"."""
    if isinstance(dtype, pl.List | pl.Array):
        return _kind(dtype.inner) if not isinstance(dtype.inner, pl.List | pl.Array) else "other"
    if dtype.is_numeric():
        return "number"
    texts, times = [pl.String, pl.Categorical, pl.Enum], [pl.Date, pl.Datetime]
    known = dict.fromkeys(texts, "text") | dict.fromkeys(times, "time")
    return (known | {pl.Boolean: "boolean", pl.Null: None}).get(dtype.base_type(), "other")


def _normal(piece, k, typed):
    """Column k of a piece in normal form, and of the kind that is wanted; or FormatError."""
    column, series = piece.columns[k], piece.frame[str(k)]
    if column.measure and (series.dtype.is_integer() or series.dtype.is_float()):
        return series.cast(pl.Float64).fill_nan(None)  # fast
    try:
        series = _form(series)
    except (pl.exceptions.PolarsError, OverflowError) as error:
        found = f"{piece.place}, column {column.name!r}: it holds numbers beyond 64 bits, or"
        raise FormatError(f"{found} times finer than a microsecond ({error})") from error
    if not typed and series.dtype == pl.String:
        series = _read(piece, k, series)
    kind, found = "number" if column.measure else column.kind, _kind(series.dtype)
    if kind and found not in (None, kind) and not (column.measure and found == "boolean"):
        piece.refuse(k, series.is_not_null(), f"not a {kind}")
        series = pl.Series([None] * len(series))
    if series.dtype == pl.Null and column.bag:
        return series.cast(pl.List(pl.Null))
    return series.cast(pl.Float64) if column.measure else series


def _form(series):
    """A polars Series in the normal form of its own kind."""
    dtype = series.dtype
    if isinstance(dtype, pl.List | pl.Array):
        lists = series.cast(pl.List(dtype.inner))
        lengths = lists.list.len().fill_null(0)
        flat = lists.filter(lengths > 0).explode()
        form = _form(flat)
        return lists if form.equals(flat, check_dtypes=True) else _bags(form, lengths.to_numpy())
    if _kind(dtype) == "text":
        texts = series.cast(pl.String)
        empty = texts == ""
        return texts.set(empty, None) if empty.any() else texts
    if dtype.is_float() or (dtype.is_decimal() and dtype.scale):
        return series.cast(pl.Float64).fill_nan(None)
    if dtype.is_numeric():
        largest = series.max()
        return series.cast(pl.Int64 if largest is None or largest < 2**63 else pl.UInt64)
    if dtype == pl.Datetime:
        if dtype.time_zone:
            series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        if dtype.time_unit == "ns" and (series.dt.nanosecond() % 1000).max():
            raise OverflowError("nanoseconds")
    return series.cast(pl.Datetime("us")) if _kind(dtype) == "time" else series


def _bags(flat, lengths):
    """A Series of lists from their values, one after the other; an empty list is a missing one."""
    rows = np.arange(len(lengths))
    each = pl.DataFrame({"row": np.repeat(rows, lengths), "bag": flat})
    bags = each.group_by("row", maintain_order=True).agg("bag")
    return pl.DataFrame({"row": rows}).join(bags, "row", how="left", maintain_order="left")["bag"]


def _read(piece, k, texts):
    """A CSV's texts as the kind that is wanted; FormatError for the first that is not of it."""
    column = piece.columns[k]
    if column.kind == "text" and not column.bag:  # at once: of the rest a million rows take seconds
        return texts
    lower = texts.str.strip_chars().str.to_lowercase()
    truth = lower.replace_strict(["true", "false"], [True, False], default=None)
    if column.bag:
        found = f"{piece.place}, column {column.name!r}"
        raise FormatError(f"{found}: a list needs a parquet or a frame, a CSV has none")
    if column.measure or column.kind == "number":
        for dtype in (pl.Int64, pl.UInt64):
            values = lower.cast(dtype, strict=False)
            if values.null_count() == texts.null_count():
                return values
        values, whole = lower.cast(pl.Float64, strict=False), lower.cast(pl.Int128, strict=False)
        if column.measure:
            values = values.fill_null(truth.cast(pl.Float64))
        else:
            rounded = (values.cast(pl.Int128, strict=False) != whole).fill_null(False)
            piece.refuse(k, rounded, "too long among numbers with fractions")
    elif column.kind == "boolean":
        values = truth
    elif column.kind == "time":
        known = {text: _instant(text) for text in texts.unique().drop_nulls()}
        values = texts.replace_strict(known, default=None, return_dtype=DTYPES["time"])
    else:
        return texts
    wanted = "number" if column.measure else column.kind
    piece.refuse(k, texts.is_not_null() & values.is_null(), f"not a {wanted}")
    return values.fill_nan(None) if values.dtype == pl.Float64 else values


def _instant(text):
    try:
        return _plain(datetime.datetime.fromisoformat(text))[1]
    except ValueError:
        return None


# ---- Values of Python, NumPy and pandas ----------------------------------------------------------


def _series(values, column):
    """A Series of pandas or polars as one of polars; FormatError for a value of another kind."""
    if isinstance(values, pl.Series):
        objects = values.dtype == pl.Object
        return _of_values(values.to_list(), range(len(values)), column) if objects else values
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "biuf":
        return pl.Series(values.to_numpy())
    if isinstance(values.dtype, pd.StringDtype):
        return pl.Series(values.to_numpy(object, na_value=None).tolist(), dtype=pl.String)
    return _of_values(values.tolist(), range(len(values)), column)


def _of_values(values, rows, column):
    """A Series of any values, which stand in `rows`; FormatError for one of another kind.

    That is the kind that is wanted, or else the first one's.
    """
    if column.bag:
        listed = [isinstance(bag, LISTS) for bag in values]
        for row, bag, is_list in zip(rows, values, listed):
            if not is_list and _plain(bag)[0]:
                raise refused("the frame", row, column.name, bag, "not a list")
        bags = list(itertools.compress(values, listed))
        lengths = np.zeros(len(values), int)
        lengths[listed] = [*map(len, bags)]
        flat = list(itertools.chain.from_iterable(bags))
        return _bags(
            _of_values(flat, np.repeat(rows, lengths), column._replace(bag=False)), lengths
        )
    types = set(map(type, values)) - {type(None)}
    if dtype := {(str,): pl.String, (float,): pl.Float64}.get(tuple(types)):
        return pl.Series(values, dtype=dtype)  # fast
    kinds, plain = zip(*map(_plain, values)) if values else ((), ())
    if column.measure:
        kinds = ["number" if kind == "boolean" else kind for kind in kinds]
    wanted = "number" if column.measure else column.kind or next(filter(None, kinds), None)
    what = f"not a {wanted}" if wanted in DTYPES else NO_KIND
    for row, kind, value in zip(rows, kinds, values):
        if kind is not None and (kind != wanted or what == NO_KIND):
            raise refused("the frame", row, column.name, value, what)
    if wanted == "number":
        return _numbers(plain, rows, column)
    return pl.Series(plain, dtype=DTYPES.get(wanted, pl.Null))


def _numbers(values, rows, column):
    """Integers as Int64 or UInt64, all else as Float64, which may not round an integer name."""
    for dtype in (pl.Int64, pl.UInt64):
        with contextlib.suppress(TypeError, OverflowError):
            return pl.Series(values, dtype=dtype)
    most = 2**1023 if column.measure else 2**64
    for row, value in zip(rows, values):
        whole = isinstance(value, int)
        if whole and (abs(value) >= most or not (column.measure or float(value) == value)):
            what = "beyond 64 bits, or too long among numbers with fractions"
            raise refused("the frame", row, column.name, value, what)
    return pl.Series(
        [None if value is None else float(value) for value in values], dtype=pl.Float64
    )


PLAIN = (
    ((str,), "text", str),
    ((bool, np.bool_), "boolean", bool),
    ((int, np.integer), "number", int),
    ((float, np.floating), "number", float),
)


def _plain(value):
    """(kind, value) of one value as Python has it; (None, None) if it is missing."""
    if isinstance(value, decimal.Decimal):
        whole = value.is_finite() and value % 1 == 0
        value = math.nan if value.is_nan() else int(value) if whole else float(value)
    value = pd.Timestamp(value) if isinstance(value, np.datetime64) else value
    value = pd.Timedelta(value) if isinstance(value, np.timedelta64) else value
    if value is None or value is pd.NA or value is pd.NaT:
        return None, None
    for types, kind, python in PLAIN:
        if isinstance(value, types):
            return (None, None) if kind == "number" and value != value else (kind, python(value))
    if not isinstance(value, datetime.date) or getattr(value, "nanosecond", 0):
        return f"{type(value).__module__}.{type(value).__name__}", value
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    value = value.to_pydatetime() if isinstance(value, pd.Timestamp) else value
    return "time", value.astimezone(datetime.UTC).replace(tzinfo=None) if value.tzinfo else value


# ---- CSV -----------------------------------------------------------------------------------------
# polars would lose rows without a word at a stray quotation mark. So each piece is looked at: where
# all its lines are plain, polars reads it; else Python's own reader does, which is strict.


def _header(file, path):
    """The names in a CSV's first line, and what separates them; the file stands behind it."""
    start = file.readline(1 << 20).removeprefix(b"\xef\xbb\xbf")
    if b"\0" in start:
        raise FormatError(f"{path} is no text; unpack archives, name a table .parquet")
    separator = "\t" if b"\t" in start else ","
    lines = map(bytes.decode, itertools.chain([start], iter(file.readline, b"")))
    try:
        return next(csv.reader(lines, delimiter=separator, strict=True), []), separator
    except (csv.Error, UnicodeDecodeError) as error:
        raise FormatError(f"{path}, its header: {error}") from error


def _csv(path, places, separator, width):
    """A CSV's columns by their places, all texts, a frame at a time."""
    field = f'(?:[^"{separator}]*|"(?:[^"]|"")*")'
    line = f"^{field}(?:{separator}{field}){{{width - 1}}}$"
    with open(path, "rb") as file:
        _header(file, path)
        row = 1
        while text := file.read(files.PIECE):
            text += file.readline()
            if width > 1 and not file.peek(1):
                text = text.rstrip(b"\r\n")  # an empty last line
            fields = _plain_lines(text, line, separator, width)
            if fields is None:
                rows = _any_lines(file, text, f"{path}, row", row, separator, width)
                fields = pl.DataFrame(rows, [str(p) for p in range(width)], orient="row")
            row += len(fields)
            yield fields.select(pl.nth(p).alias(str(k)) for k, p in places.items())


def _plain_lines(text, line, separator, width):
    """The fields of lines if all are plain, else None."""
    try:
        lines = pl.read_lines(text)["line"]
        if not lines.str.contains(line).all():
            return None
        options = {"has_header": False, "separator": separator}
        fields = pl.read_csv(text, schema={str(p): pl.String for p in range(width)}, **options)
    except pl.exceptions.PolarsError:
        return None
    return fields if len(fields) == len(lines) else None


def _any_lines(file, text, place, row, separator, width):
    """The rows of any lines; the last one may end in lines that the file still holds."""
    piece, rows = text.splitlines(keepends=True), []
    lines = map(bytes.decode, itertools.chain(piece, iter(file.readline, b"")))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        while reader.line_num < len(piece):
            fields = next(reader) or [""]
            if len(fields) != width:
                found = f"{len(fields)} fields, but the header has {width}"
                raise FormatError(f"{place} {row + len(rows)}: {found}")
            rows.append(fields)
    except (csv.Error, UnicodeDecodeError) as error:
        raise FormatError(f"{place} {row + len(rows)}: {error}") from error
    return rows
