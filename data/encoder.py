"""One encoder for every table: kinds, scales and names are fixed by `fit` and strict afterwards.

It turns rows into plain NumPy arrays; a table larger than memory is fitted by the same functions,
a piece at a time.
"""

import collections
import datetime
import hashlib
import io
import itertools
import math
import operator
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl

from data import files, tables
from data.files import MISSING, FormatError
from data.tables import Column

VERSION, SETTINGS = "data.encoder 1", "settings.json"
OPTIONS = ("dense", "categorical", "multi_hot", "label", "min_count", "counts", "max_table_rows")
BLOCK = 65_536  # rows that are summed together for a scale, wherever a table is cut


class Vocabulary:
    """Which value has which row of an embedding table.

    Id 0 is for values not seen in `fit`; the more frequent a value, the smaller its id, ties by
    first sight. A missing value (None, NaN, NaT, pd.NA) is a value of its own: None.
    """

    UNKNOWN = "<unknown>"

    def __init__(self, values):
        self.values = _plain(values)  # of ids 1, 2, 3, ...
        self._ids = {value: k for k, value in enumerate(self.values, 1)}
        if len(self._ids) < len(self.values):
            twice = collections.Counter(self.values).most_common(1)[0][0]
            raise ValueError(f"{twice!r} stands twice among the values; each has one id")

    @classmethod
    def fit(cls, values, min_count=1, max_size=None):
        """Number the values seen min_count times or more, in at most max_size table rows."""
        if min_count < 1 or (max_size is not None and max_size < 1):
            raise ValueError(f"min_count {min_count} and max_size {max_size} must be 1 or more")
        counts = collections.Counter(_plain(values))  # in order of first sight, as sorted keeps it
        kept = [value for value, count in counts.items() if count >= min_count]
        kept.sort(key=counts.get, reverse=True)
        return cls(kept[: None if max_size is None else max_size - 1])  # id 0 has a row

    def __len__(self):
        return len(self.values) + 1

    def encode(self, values):
        """Ids of values, int64 of shape (len(values),); 0 where a value is unknown."""
        if isinstance(values, pl.Series) and len(values) > 64:
            codes, distinct = distinct_of(values)
            return self.encode(distinct.to_list())[codes]
        ids = self._ids
        return np.array([ids.get(value, 0) for value in _plain(values)], dtype=np.int64)

    def decode(self, ids):
        """The values of ids: a list; None for the missing value, `Vocabulary.UNKNOWN` for id 0."""
        ids = np.asarray(ids)
        if len(ids) and ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers, not {ids.dtype}")
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(f"this vocabulary has ids 0 to {len(self) - 1}, not all of {ids}")
        return [self.values[i - 1] if i else self.UNKNOWN for i in ids.tolist()]


def _plain(values):
    """A list of values, None where one is missing."""
    if isinstance(values, np.ndarray):
        values = pd.Series(values)
    values = values.to_list() if hasattr(values, "to_list") else list(values)
    return [None if v is None or v is pd.NA or v != v else v for v in values]


# ---- Rules that memory and folder share ----------------------------------------------------------


def distinct_of(series):
    """(codes, distinct): the distinct values by first sight, and the place of each value there."""
    whole, missing = series, series.null_count()
    if series.dtype == pl.String:  # texts of 8 bytes each, as Criteo's are, as integers
        whole = series.cast(pl.Binary).bin.reinterpret(dtype=pl.UInt64, endianness="little")
    usable = whole.dtype.is_integer() and whole.null_count() == missing < len(series)
    if usable and (not missing or whole.min() > 0):  # so 0 can stand for the missing one
        codes, _ = pd.factorize(whole.fill_null(0).to_numpy())
        new = np.diff(np.maximum.accumulate(codes), prepend=-1)  # 1 at a first sight, else 0
        return codes, series.gather(np.flatnonzero(new)).alias("name")
    distinct = series.unique(maintain_order=True).alias("name")
    known, given = distinct.to_frame().with_row_index("place"), pl.DataFrame({"name": series})
    given = given.join(known, "name", how="left", nulls_equal=True, maintain_order="left")
    return given["place"].to_numpy(), distinct


def name_form(values):
    """Names in the form in which they are compared, from a Series in normal form.

    A number that a float32 holds is named by its shortest decimal: .1 is .1 in either precision.
    """
    if values.dtype != pl.Float64:
        return values
    short = values.cast(pl.Float32)
    decimals = pl.DataFrame({"long": values, "short": short.cast(pl.String).cast(pl.Float64)})
    in_both = short.cast(pl.Float64) == values
    return decimals.select(pl.when(in_both).then("short").otherwise("long") + 0.0).to_series()


def name_texts(names):
    """Names as the texts of a vocabulary's file: 7 and 7.0 are 7, times as 2020-01-31 12:00:00."""
    if names.dtype != pl.Float64:
        return names.cast(pl.String)
    whole = names.is_finite() & (names == names.floor()) & (names.abs() < 2.0**64)
    whole_texts = names.set(~whole, None).cast(pl.Int128).cast(pl.String)
    return whole_texts.zip_with(whole.fill_null(True), names.cast(pl.String))


def values_of(texts, kind):
    """The values of `name_texts`, a list of Python's; None for the missing one."""
    read = {
        "number": lambda text: int(text) if text.lstrip("-").isdigit() else float(text),
        "boolean": "true".__eq__,
        "time": datetime.datetime.fromisoformat,
    }.get(kind, str)
    return [None if text is None else read(text) for text in texts.to_list()]


def counted(names):
    """The distinct names of a Series as texts, by first sight, and how often each is there."""
    if names.dtype.is_integer():
        codes, distinct = distinct_of(names)
        counts = np.bincount(codes, minlength=len(distinct)).astype(np.uint32)
        return pl.DataFrame({"name": name_texts(distinct), "count": counts})
    counts = pl.DataFrame({"name": names}).group_by("name", maintain_order=True).len("count")
    return counts.with_columns(name=name_texts(counts["name"]))


def merged(counts):
    """What `counted` gave for pieces in order, as one."""
    if len(counts) == 1:
        return counts[0]
    return pl.concat(counts).group_by("name", maintain_order=True).agg(pl.col("count").sum())


def numbered(counts, min_count, max_table_rows):
    """The names that have ids 1, 2, ...: the most frequent first, ties by first sight."""
    kept = counts.filter(pl.col("count") >= min_count)
    kept = kept.sort("count", descending=True, maintain_order=True)["name"]
    return kept if max_table_rows is None else kept.head(max_table_rows - 1)


def scale(blocks):
    """[mean, standard deviation] of each column, of a constant one [mean, 1].

    blocks: a function that gives the numbers in blocks (BLOCK rows, columns), float64, NaN where
    missing; it is called three times. So it does not matter how a table is cut.
    """

    def total(function):
        sums = [np.nansum(np.ascontiguousarray(function(block).T), axis=1) for block in blocks()]
        return np.array([math.fsum(column) for column in zip(*sums)])

    count = np.maximum(total(np.isfinite), 1)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = total(lambda block: block) / count
        deviation = np.sqrt(total(lambda block: (block - mean) ** 2) / count)
    deviation[deviation <= 1e-12 * np.abs(mean)] = 1.0  # rounding leaves less of a constant one
    return np.stack([mean, deviation], axis=1).tolist()


def write_names(file, pieces):
    """Write a vocabulary as CSV into an open binary file, its names (Series of texts) in order of
    their ids; returns what `Encoder.set_fitted` is told of it: its table rows, bytes and hash."""
    digest, rows, size = hashlib.sha256(), 1, 0
    for names in itertools.chain([pl.Series(dtype=pl.String)], pieces):
        table = pl.DataFrame({"id": np.arange(rows, rows + len(names)), "name": names})
        text = table.write_csv(include_header=size == 0).encode()
        digest.update(text)
        size += file.write(text)
        rows += len(names)
    return {"rows": rows, "bytes": size, "hash": digest.hexdigest()[:16]}


# ---- The encoder ---------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """B rows for a model. numbers (B, n) float32; of each table ids int64 (nnz,), and lengths int64
    (B,) or None where each row has one id; labels (B,) float32, or None."""

    numbers: np.ndarray
    ids: list
    lengths: list
    labels: np.ndarray | None


class Encoder:
    """Turns rows of any table into `Arrays`; what does not fit is refused by row and column.

    dense: numeric columns, scaled to mean 0 and standard deviation 1 in `fit`; missing as 0.
    counts: numeric columns with long tails, log(1 + max(x, 0)), after `dense`; missing as 0.
    categorical: one name a row: a text, a number, a boolean or a time, one kind a column.
    multi_hot: a list of such names a row, a missing one an empty bag.
    label: a column of 0 and 1, given back where the rows have it.
    min_count, max_table_rows: names seen less often in `fit`, or beyond so many rows of a table,
    are the unknown one, whose row is trained so. kinds: {column: kind}, what a CSV cannot say.
    """

    def __init__(
        self, dense=(), categorical=(), multi_hot=(), label=None, min_count=1, counts=(),
        max_table_rows=None, kinds=(),
    ):  # fmt: skip
        self.dense, self.counts = _names(dense), _names(counts)
        self.categorical, self.multi_hot = _names(categorical), _names(multi_hot)
        self.label = None if label is None else _names([label])[0]
        self.min_count = _limit("min_count", min_count)
        self.max_table_rows = _limit("max_table_rows", max_table_rows, none=True)
        self.numeric, self.tables = self.dense + self.counts, self.categorical + self.multi_hot
        for names in (self.numeric, self.tables):
            if len({*names, self.label}) <= len(names):
                raise ValueError(f"a column is named twice among {[*names, self.label]}")
        for name, kind in dict(kinds).items():
            if name not in self.tables or kind not in tables.KINDS:
                known = f"kinds has one of {tables.KINDS} for some of {self.tables}"
                raise ValueError(f"{known}, not {kind!r} for {name!r}")
        self.kinds, self.scales = dict(kinds), None  # by column; fit fixes them
        self._given_kinds = self.kinds
        self._first = int(self.label is not None)
        self._texts, self._abouts, self._vocabularies, self._folder = {}, {}, {}, None

    def columns(self, label="needed"):
        """What it reads, in order: label, dense, counts, categorical, multi_hot.

        label: "needed", "welcome" (read if it is there), or "unread".
        """
        name = None if label == "unread" else self.label
        first = [Column(name, measure=True, optional=label != "needed")][: self._first]
        bags = set(self.multi_hot)
        names = [Column(c, bag=c in bags, kind=self.kinds.get(c)) for c in self.tables]
        return first + [Column(c, measure=True) for c in self.numeric] + names

    def place(self, name):
        """Where a table's column stands among `columns`."""
        return self._first + len(self.numeric) + self.tables.index(name)

    # ---- Fitting ----

    def fit(self, rows):
        """Learn scales, kinds and names from the training rows alone. Returns self."""
        given = self._given_kinds.get
        columns = [c if c.measure else c._replace(kind=given(c.name)) for c in self.columns()]
        sources = tables.sources(rows, columns)
        columns = tables.agreed(columns, sources)
        numbers, counts = [], {name: [] for name in self.tables}
        for piece in (piece for source in sources for piece in source.pieces(columns)):
            self.labels(piece)
            numbers.append(self.numbers(piece))
            for name in self.tables:
                counts[name].append(counted(self.bags(piece, name)[0]))
        numbers = np.concatenate(numbers)[:, : len(self.dense)]
        if not len(numbers):
            raise ValueError("there are no rows to fit")
        cuts = range(0, len(numbers), BLOCK)
        scales = scale(lambda: (numbers[at : at + BLOCK] for at in cuts))
        limits = self.min_count, self.max_table_rows
        names = {name: numbered(merged(counts[name]), *limits) for name in self.tables}
        kinds = {column.name: column.kind for column in columns if not column.measure}
        return self.set_fitted(kinds, scales, names)

    def set_fitted(self, kinds, scales, names, folder=None):
        """Fix what `fit` found: a kind a table; [mean, deviation] a dense column; the names of each
        table, as texts in order of their ids or as `write_names` said of its file in folder."""
        for column, one in zip(self.dense, scales, strict=True):
            if not np.isfinite(one).all():
                raise FormatError(f"column {column!r}: its numbers are too large to be scaled")
        self.kinds, self.scales = dict(kinds), [list(one) for one in scales]
        self._folder, self._vocabularies = folder, {}
        self._texts = {n: each for n, each in names.items() if isinstance(each, pl.Series)}
        self._abouts = {n: each for n, each in names.items() if n not in self._texts}
        return self

    @property
    def table_sizes(self):
        """Rows of each embedding table, in the order of categorical and multi_hot."""
        return [self.about(name)["rows"] for name in self.tables]

    def names(self, name):
        """A column's names of ids 1, 2, ... as texts, a polars Series; the missing one is null."""
        self._require_fit()
        if name not in self._texts:
            path = Path(self._folder, self.file_of(name))
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] != self._abouts[name]["hash"]:
                raise FormatError(f"{path} was changed after it was written")
            schema = {"id": pl.Int64, "name": pl.String}
            self._texts[name] = pl.read_csv(content, schema=schema)["name"]
        return self._texts[name]

    def about(self, name):
        """What `write_names` says of a column's names."""
        self._require_fit()
        if name not in self._abouts:
            self._abouts[name] = write_names(io.BytesIO(), [self._texts[name]])
        return self._abouts[name]

    def vocabulary(self, name):
        """A column's `Vocabulary`."""
        if name not in self._vocabularies:
            values = values_of(self.names(name), self.kinds[name])
            self._vocabularies[name] = Vocabulary(values)
        return self._vocabularies[name]

    def _require_fit(self):
        if self.scales is None:
            raise ValueError(f"this {type(self).__name__} has seen no rows; call fit(rows) first")

    # ---- From rows to arrays ----

    def arrays(self, rows):
        """`Arrays` of all rows in order; `tables.sources` says what rows can be."""
        return joined(list(self.pieces(rows)))

    def pieces(self, rows, label="welcome"):
        """The `Arrays` of a piece of the rows at a time."""
        self._require_fit()
        columns = self.columns(label)
        for source in tables.sources(rows, columns):
            yield from map(self.encoded, source.pieces(columns))

    def encoded(self, piece):
        """`Arrays` of a piece in normal form."""
        bags = [self.bags(piece, name) for name in self.tables]
        names, lengths = zip(*bags) if bags else ((), ())
        return self.laid(self.numbers(piece), names, lengths, self.labels(piece), piece)

    def laid(self, numbers, names=(), lengths=(), labels=None, piece=None):
        """`Arrays` from numbers (B, n) float64, and names and lengths a table."""
        ids = [self.vocabulary(table).encode(n) for table, n in zip(self.tables, names)]
        return Arrays(self.scaled(numbers, piece), ids, list(lengths), labels)

    def numbers(self, piece):
        """The numeric columns of a piece, (B, n) float64, a missing one as NaN."""
        places = range(self._first, self._first + len(self.numeric))
        for k in places:
            piece.refuse(k, piece.frame[str(k)].is_infinite(), "infinite")
        numbers = piece.frame.select(map(str, places)).fill_null(math.nan).to_numpy(order="c")
        return numbers.reshape(len(piece.frame), len(places))

    def labels(self, piece):
        """The label of each row of a piece, float32 of 0 and 1, or None."""
        if not self._first or "0" not in piece.frame.columns:
            return None
        label = piece.frame["0"]
        piece.refuse(0, ~label.is_in([0.0, 1.0]).fill_null(False), "neither 0 nor 1")
        return label.to_numpy().astype(np.float32)

    def bags(self, piece, name):
        """A table's names in a piece, one after the other, and how many each row has, or None."""
        k, lengths = self.place(name), None
        names = piece.frame[str(k)]
        if piece.columns[k].bag:
            lengths = names.list.len().fill_null(0).to_numpy().astype(np.int64)
            names = names.filter(lengths > 0).explode()
        if names.dtype == pl.Float64 and names.is_infinite().any():
            each = np.ones(len(names), int) if lengths is None else lengths
            rows = np.arange(len(each)).repeat(each)[names.is_infinite().arg_true()]
            piece.refuse(k, np.isin(np.arange(len(each)), rows), "infinite")
        return name_form(names), lengths

    def scaled(self, numbers, piece=None):
        """What the model reads of numbers (B, n), float32, a missing one as 0."""
        self._require_fit()
        read, dense = np.array(numbers, dtype=np.float64), len(self.dense)
        if numbers.dtype == np.int32:
            read[numbers == MISSING] = math.nan
        for k, (mean, deviation) in enumerate(self.scales):
            read[:, k] = (read[:, k] - mean) / deviation
        read[:, dense:] = np.log1p(np.maximum(read[:, dense:], 0))
        read[np.isnan(read)] = 0
        with np.errstate(over="ignore"):
            small = read.astype(np.float32)
        if not np.isfinite(small).all():
            row, k = np.argwhere(~np.isfinite(small))[0].tolist()
            place, first = (piece.place, piece.row) if piece else ("the rows", 0)
            value, what = float(numbers[row, k]), "too large, once it is scaled"
            raise tables.refused(place, first + row, self.numeric[k], value, what)
        return small

    # ---- The saved form ----

    def fingerprint(self):
        """A text that another encoder shares only if it encodes alike."""
        columns = [self.label, self.dense, self.counts, self.categorical, self.multi_hot]
        hashes = [self.about(name)["hash"] for name in self.tables]
        return files.hash_of([columns, list(self.kinds.items()), self.scales, hashes])

    def save(self, folder):
        """Write a folder: settings as JSON, each vocabulary as CSV; an older one is replaced."""
        self._require_fit()
        folder = Path(folder).resolve()
        if folder.exists() and any(folder.iterdir()) and not (folder / SETTINGS).exists():
            raise ValueError(f"{folder} holds what save did not write; name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            new, old = Path(work, "new"), Path(work, "old")
            for name in self.tables:
                with files.replacing(new / self.file_of(name)) as path, open(path, "wb") as file:
                    self._abouts[name] = write_names(file, [self.names(name)])
            self.write_settings(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        files.flush(folder.parent)

    def write_settings(self, folder):
        """Write the settings alone, into a folder where the vocabularies lie."""
        # Pairs, since JSON's dicts would make texts of columns whose names are numbers.
        content = {"options": {option: getattr(self, option) for option in OPTIONS}}
        content |= {"kinds": [*self.kinds.items()], "scales": self.scales}
        names = [[name, self.about(name)] for name in self.tables]
        files.write_json(Path(folder, SETTINGS), VERSION, content | {"names": names})

    @classmethod
    def load(cls, folder):
        """Open what `save` wrote; ValueError for any other folder. Names are read when needed."""
        folder = Path(folder)
        try:
            content = files.read_json(folder / SETTINGS, VERSION)
            encoder, names = cls(**content["options"]), dict(content["names"])
            for name, about in names.items():
                if (folder / encoder.file_of(name)).stat().st_size != about["bytes"]:
                    raise ValueError(f"{folder / encoder.file_of(name)} is cut")
        except FileNotFoundError as error:
            raise ValueError(f"{folder} is not a whole folder of an encoder: {error}") from error
        return encoder.set_fitted(content["kinds"], content["scales"], names, folder)

    def file_of(self, name):
        """The name of a table's vocabulary: its place, and what is letters and digits of it."""
        plain = "".join(letter for letter in str(name) if letter.isalnum())[:40]
        return f"{self.place(name)}-{plain}.csv"


def joined(parts):
    """`Arrays` of pieces, one after the other."""
    if len(parts) == 1:
        return parts[0]
    numbers, ids, lengths, labels = zip(*parts)
    ids, lengths = (
        [None if each[0] is None else np.concatenate(each) for each in zip(*part)]
        for part in (ids, lengths)
    )
    labels = None if labels[0] is None else np.concatenate(labels)
    return Arrays(np.concatenate(numbers), ids, lengths, labels)


def _names(names):
    """A list of column names, each a text or a whole number."""
    if isinstance(names, str):
        raise ValueError(f"{names!r} is one name; write [{names!r}]")
    return [name if isinstance(name, str) else operator.index(name) for name in names]


def _limit(name, value, none=False):
    if value is None and none:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be 1 or more")
    return int(value)
