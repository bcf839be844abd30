"""Tables of any kind in one normal form, piece by piece; a wrong row, column and file named.

Normal form: a column holds numbers (Int64, UInt64 or Float64), texts, booleans, times (UTC, in
microseconds), or lists of these; a missing value and an empty text are null. A CSV has no kinds:
its texts are read as the kind that is asked for, and so are the texts of Python's values.
"""

import csv
import datetime
import decimal
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl

from data import files
from data.files import FormatError

PIECE_ROWS = 1 << 17  # rows of a parquet or a frame that are handled together
KINDS = ["text", "number", "boolean", "time"]
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
        with files.damage_named(self.place):
            frames = iter(self.read())
            for frame in itertools.chain([next(frames, self.empty)], frames):
                raw = Piece(frame, columns, self.place, row)
                made = {name: _normal(raw, int(name), self.typed) for name in frame.columns}
                yield raw._replace(frame=pl.DataFrame(made))
                row += len(frame)


def agreed(columns, tables):
    """The columns with the one kind that all sources have; text where there are CSVs alone."""
    made = []
    for k, column in enumerate(columns):
        kind = column.kind
        for table in () if column.measure else (table for table in tables if table.typed):
            found = _kind(table.empty.schema[str(k)])
            if found and kind not in (None, found):
                what = f"it holds {found}s, not {kind}s as wanted or as in another file"
                raise FormatError(f"{table.place}, column {column.name!r}: {what}")
            kind = kind or found
        untyped = not (column.measure or all(table.typed for table in tables))
        made.append(column._replace(kind=kind or ("text" if untyped else None)))
    return made


# ---- What rows can be ----------------------------------------------------------------------------


def sources(rows, columns, any_capitals=False):
    """A `Source` for each file, or one for what lies in memory; all headers are looked at now.

    rows: a path or several, .parquet or else CSV; a frame of pandas or polars, a LazyFrame; a dict
    or a Series (one row), a dict of lists, a list of dicts. any_capitals: names in any capitals.
    """
    rows = [rows] if isinstance(rows, str | Path) else rows
    if isinstance(rows, list | tuple) and rows and all(isinstance(r, str | Path) for r in rows):
        return [_file(Path(path), columns, any_capitals) for path in rows]
    if isinstance(rows, list | tuple) and all(isinstance(row, dict) for row in rows):
        none = {column.name: [] for column in columns}
        rows = pd.DataFrame(list(rows), dtype=object) if rows else none
    if isinstance(rows, dict | pd.Series):
        rows = _dict(dict(rows), columns)
    if isinstance(rows, pd.DataFrame):
        places = _places(list(rows.columns), columns, "the frame", any_capitals)
        made = {str(k): _series(rows.iloc[:, p], columns[k]) for k, p in places.items()}
        return [_source(pl.DataFrame(made), "the frame", 0, columns)]
    if isinstance(rows, pl.DataFrame | pl.LazyFrame):
        return [_source(_picked(rows, columns, "the frame", any_capitals), "the frame", 0, columns)]
    known = "a DataFrame, a LazyFrame, a dict, a list of dicts, or a path"
    raise FormatError(f"rows are {known}, not {type(rows).__name__}")


def _dict(rows, columns):
    """One row, or a frame if its values are lists, of bags lists of lists."""
    wanted = {str(column.name).lower() for column in columns}
    rows = {name: value for name, value in rows.items() if str(name).lower() in wanted}
    bags = {column.name for column in columns if column.bag}
    lists = [isinstance(value, LISTS) for name, value in rows.items() if name not in bags]
    if not lists:
        inner = itertools.chain.from_iterable(value or () for value in rows.values())
        lists = [bag is None or isinstance(bag, LISTS) for bag in inner]
    rows = rows if all(lists) else {name: [value] for name, value in rows.items()}
    return pd.DataFrame({n: pd.array(list(v), dtype=object) for n, v in rows.items()})


def _file(path, columns, any_capitals):
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() == ".parquet":
        with files.damage_named(path):
            table = pl.scan_parquet(path, glob=False)
            source = _source(_picked(table, columns, path, any_capitals), path, 1, columns)
            rows = table.select(pl.len()).collect().item()
    else:
        pieces = _csv(path)
        places = _places(list(next(pieces, [[]])[0]), columns, path, any_capitals)

        def read():
            for rows in itertools.islice(_csv(path), 1, None):
                yield pl.DataFrame({str(k): rows.list.get(p) for k, p in places.items()})

        empty = pl.DataFrame(schema={str(k): pl.String for k in places})
        source = _source(empty, path, 1, columns)._replace(read=read, typed=False)
        rows = len(next(pieces, ()))
    if not rows:
        raise FormatError(f"{path} has a header and no rows")
    return source


def _picked(table, columns, place, any_capitals):
    """The wanted columns of a frame or LazyFrame of polars, named by their place in `columns`."""
    places = _places(table.collect_schema().names(), columns, place, any_capitals)
    return table.select(pl.nth(p).alias(str(k)) for k, p in places.items())


def _places(names, columns, place, any_capitals):
    """{k of columns: where its name stands}; FormatError for one that is absent, or there twice."""
    plain = (lambda name: str(name).lower()) if any_capitals else str
    found, places = [plain(name) for name in names], {}
    for k, column in enumerate(columns):
        many = found.count(plain(column.name))
        if column.name is None or (column.optional and not many):
            continue
        if many != 1:
            what = "several columns" if many else "no column"
            known = place == "the frame" or {plain(other.name) for other in columns} & {*found}
            hint = "" if known else ": its first line is no header"
            raise FormatError(f"{place} has {what} {column.name!r}; it has {names}{hint}")
        places[k] = found.index(plain(column.name))
    return places


def _source(table, place, first_row, columns):
    """The source of a frame or LazyFrame of polars whose columns are of some kind each."""
    schema = table.collect_schema()
    for name, dtype in schema.items():
        column, listed = columns[int(name)], isinstance(dtype, pl.List | pl.Array)
        if _kind(dtype) == "other" or (dtype != pl.Null and listed != column.bag):
            found = f"it holds {dtype}, {NO_KIND}{' in a list' if column.bag else ''}"
            raise FormatError(f"{place}, column {column.name!r}: {found}")
    options = {"chunk_size": PIECE_ROWS, "maintain_order": True}
    read = functools.partial(table.lazy().collect_batches, **options)
    return Source(place, pl.DataFrame(schema=schema), read, first_row)


def _csv(path):
    """A CSV's rows, its header first: Series of lists of fields, a piece of the file each.

    Python's own reader, which is strict, reads what holds quotation marks. Where there are none
    a line is only split, ten times as fast.
    """
    row, width = 0, None
    with open(path, "rb") as file:
        text = file.readline(1 << 20).removeprefix(b"\xef\xbb\xbf")
        if b"\0" in text:
            raise FormatError(f"{path} is no text; unpack archives, name a table .parquet")
        separator = "\t" if b"\t" in text else ","
        while text:
            fields = []
            try:
                if b'"' in text:
                    lines = text.splitlines(keepends=True)
                    more = map(bytes.decode, itertools.chain(lines, file))
                    reader = csv.reader(more, delimiter=separator, strict=True)
                    while reader.line_num < len(lines):
                        fields.append(next(reader) or [""])
                else:
                    text.decode()
                    fields = pl.read_lines(text)["line"].str.split(separator)
            except UnicodeDecodeError as error:
                row += len(fields) + error.object.count(b"\n", 0, error.start)
                raise FormatError(f"{path}, row {row}: {error}") from error
            except csv.Error as error:
                raise FormatError(f"{path}, row {row + len(fields)}: {error}") from error
            fields = pl.Series(fields, dtype=pl.List(pl.String))
            width = width or len(fields[0])
            for at in (fields.list.len() != width).arg_true()[:1]:
                found = f"{len(fields[at])} fields, but the header has {width}"
                raise FormatError(f"{path}, row {row + at}: {found}")
            yield fields
            row += len(fields)
            text = file.read(files.PIECE) + file.readline()
            if width > 1 and not file.peek(1):
                text = text.rstrip(b"\r\n")  # an empty last line


# ---- Normal form ---------------------------------------------------------------------------------

KIND_OF = dict.fromkeys([pl.String, pl.Categorical, pl.Enum], "text") | {
    pl.Boolean: "boolean", pl.Date: "time", pl.Datetime: "time", pl.Null: None
}  # fmt: skip


def _kind(dtype):
    """The kind of a column, or of its lists' values; None if all are missing; or "other"."""
    dtype = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
    return "number" if dtype.is_numeric() else KIND_OF.get(dtype.base_type(), "other")


def _normal(piece, k, typed):
    """Column k of a piece in normal form, and of the kind that is wanted; or FormatError."""
    column, series = piece.columns[k], piece.frame[str(k)]
    refuse = functools.partial(piece.refuse, k)
    try:
        series = _form(series, column.measure)
    except (pl.exceptions.PolarsError, OverflowError) as error:
        found = f"{piece.place}, column {column.name!r}: it holds numbers beyond 64 bits, or"
        raise FormatError(f"{found} times finer than a microsecond ({error})") from error
    if not typed and series.dtype == pl.String:
        series = _read(series, column, refuse)
    kind, found = "number" if column.measure else column.kind, _kind(series.dtype)
    if kind and found not in (None, kind):
        refuse(series.is_not_null(), f"not a {kind}")
        series = pl.Series([None] * len(series))
    empty = pl.Float64 if column.measure else pl.List(pl.Null) if column.bag else pl.Null
    return series.cast(empty) if series.dtype == pl.Null else series


def _form(series, measure=False):
    """A polars Series in the normal form of its own kind."""
    dtype, kind = series.dtype, _kind(series.dtype)
    if isinstance(dtype, pl.List | pl.Array):
        lists = series.cast(pl.List(dtype.inner))
        lengths = lists.list.len().fill_null(0)
        return _bags(_form(lists.filter(lengths > 0).explode()), lengths)
    if kind == "text":
        texts = series.cast(pl.String)
        empty = texts == ""
        return texts.set(empty, None) if empty.any() else texts
    if kind == "time":
        if dtype == pl.Datetime and (series.dt.nanosecond() % 1000).max():
            raise OverflowError("nanoseconds")
        return series.cast(pl.Datetime("us"))
    fractions = dtype.is_float() or (dtype.is_decimal() and dtype.scale)
    if fractions or (measure and kind in ("number", "boolean")):
        numbers = series.cast(pl.Float64)
        return numbers.fill_nan(None) if dtype.is_float() else numbers
    if kind == "number":
        return series.cast(pl.Int64 if (series.max() or 0) < 2**63 else pl.UInt64)
    return series


def _bags(flat, lengths):
    """A Series of lists from their values, one after the other; an empty list is a missing one."""
    rows = np.arange(len(lengths))
    each = pl.DataFrame({"row": rows.repeat(lengths), "bag": flat})
    bags = each.group_by("row", maintain_order=True).agg("bag")
    return pl.DataFrame({"row": rows}).join(bags, "row", how="left", maintain_order="left")["bag"]


# ---- Texts as numbers, booleans and times --------------------------------------------------------


def _read(texts, column, refuse):
    """Texts as the kind that is wanted; refuse(mask, what): called for those that are not."""
    wanted = "number" if column.measure else column.kind
    if wanted in ("text", None) or texts.dtype == pl.Null:
        return texts
    plain = texts.str.strip_chars()
    dtypes = [pl.Float64] if column.measure else [pl.Int64, pl.UInt64]
    for dtype in dtypes if wanted == "number" else ():
        values = plain.cast(dtype, strict=False)
        if values.null_count() == texts.null_count():
            return _form(values)
    lower = plain.str.to_lowercase()
    truth = lower.replace_strict(["true", "false"], [True, False], default=None)
    if wanted == "time":
        known = {text: _instant(text) for text in texts.unique().drop_nulls()}
        values = texts.replace_strict(known, default=None, return_dtype=pl.Datetime("us"))
    elif wanted == "boolean":
        values = truth
    elif column.measure:
        values = lower.cast(pl.Float64, strict=False).fill_null(truth.cast(pl.Float64))
    else:
        values, whole = lower.cast(pl.Float64, strict=False), lower.cast(pl.Int128, strict=False)
        rounded = (values.cast(pl.Int128, strict=False) != whole).fill_null(True)
        what = "beyond 64 bits, or too long among numbers with fractions"
        refuse(rounded & lower.str.contains("^[+-]?[0-9]+$"), what)
    what = "not a time to the microsecond" if wanted == "time" else f"not a {wanted}"
    refuse(texts.is_not_null() & values.is_null(), what)
    return _form(values)


def _instant(text):
    """The time in UTC that a text in ISO's form is, or None."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    if re.search("[.,][0-9]{6}0*[1-9]", text):  # finer than a microsecond
        return None
    return time.astimezone(datetime.UTC).replace(tzinfo=None) if time.tzinfo else time


# ---- Values of Python, NumPy and pandas ----------------------------------------------------------

INFERRED = {"string": "text", "boolean": "boolean"}  # what pandas calls some values
INFERRED |= dict.fromkeys(["integer", "floating", "mixed-integer-float", "decimal"], "number")
INFERRED |= dict.fromkeys(["date", "datetime", "datetime64"], "time")


def _series(values, column):
    """A Series of pandas as one of polars; FormatError for a value of another kind."""
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "biuf":
        return pl.Series(values.to_numpy())
    if isinstance(values.dtype, pd.StringDtype):  # texts alone: at once
        return pl.Series(values.to_numpy(object, na_value=None).tolist(), dtype=pl.String)
    return _of_values(values.to_numpy(object), np.arange(len(values)), column)


def _of_values(values, rows, column):
    """A Series of any values, which stand in `rows`; FormatError for one of another kind.

    That is the kind that is wanted, or else the first one's.
    """

    def refuse(wrong, what):
        for at in pl.Series(wrong).arg_true()[:1]:
            raise refused("the frame", rows[at], column.name, values[at], what)

    with decimal.localcontext(decimal.ExtendedContext):  # a signalling NaN may be compared
        missing = pd.isna(values)
    if column.bag:
        lengths = [len(value) if isinstance(value, LISTS) else -1 for value in values]
        lengths = np.array(lengths, dtype=int)
        refuse((lengths < 0) & ~missing, "not a list")
        flat = pd.array([*itertools.chain.from_iterable(values[lengths > 0])], dtype=object)
        lengths = lengths.clip(0)
        one = column._replace(bag=False)
        return _bags(_of_values(flat.to_numpy(), rows.repeat(lengths), one), lengths)
    present, infer = np.flatnonzero(~missing), pd.api.types.infer_dtype
    found = INFERRED.get(infer(values[present]))
    kinds = [found] if found else [INFERRED.get(infer([value])) for value in values[present]]
    wanted = "number" if column.measure else column.kind or next(iter(kinds), None)
    for at, kind in zip(present, kinds):
        if kind is None or (kind != wanted and not (column.measure and kind == "boolean")):
            what = f"not a {wanted}" if wanted else NO_KIND
            raise refused("the frame", rows[at], column.name, values[at], what)
    texts = np.full(len(values), None)
    wide = (float(x) if isinstance(x, np.floating) else x for x in values[present])
    texts[present] = values[present] if wanted == "text" else [*map(str, wide)]
    return _read(pl.Series(texts.tolist()), column._replace(kind=wanted), refuse)
