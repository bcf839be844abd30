"""One encoder for every table: kinds, scales and names are fixed by `fit` and strict afterwards.

It gives plain NumPy arrays; a table larger than memory is fitted by the same functions.
"""

import collections
import hashlib
import io
import json
import math
import operator
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl

from data import files, tables
from data.files import MISSING, FormatError

VERSION, SETTINGS = "data.encoder 1", "settings.json"
OPTIONS = ("dense", "categorical", "multi_hot", "label", "min_count", "counts", "max_table_rows")
COUNTS = {"name": pl.Int64, "count": pl.Int64}
FILE = {"id": pl.Int64, "name": pl.String}  # how a vocabulary is read from its file
BLOCK = 65_536  # rows that are summed together for a scale, wherever a table is cut
# B rows for a model: numbers (B, n) float32; of each table ids int64 (nnz,), and lengths int64 (B,)
# or None where each row has one id; labels (B,) float32, or None.
Arrays = collections.namedtuple("Arrays", ["numbers", "ids", "lengths", "labels"])


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
        limits = _limit("min_count", min_count), _limit("max_size", max_size, none=True)
        counts = collections.Counter(_plain(values))  # in order of first sight
        seen = [*counts]
        places = pl.DataFrame({"name": range(len(seen)), "count": [*counts.values()]}, COUNTS)
        return cls([seen[place] for place in numbered([places], *limits)[0]])

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
        whole = ids.dtype.kind in "iu"
        if len(ids) and not (whole and 0 <= ids.min() <= ids.max() < len(self)):
            raise ValueError(f"ids must be integers from 0 to {len(self) - 1}, not {ids}")
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
    if series.dtype == pl.String:  # texts of 8 bytes each, as Criteo's are, as integers: sooner
        whole = series.cast(pl.Binary).bin.reinterpret(dtype=pl.UInt64, endianness="little")
    usable = whole.dtype.is_integer() and whole.null_count() == missing < len(series)
    if usable and (not missing or whole.min() > 0):  # so 0 can stand for the missing one
        whole = whole.fill_null(0) if missing else whole
        codes, distinct = pd.factorize(whole.to_numpy())
        somewhere = np.empty(len(distinct), np.int64)
        somewhere[codes] = np.arange(len(codes))
        return codes, series[somewhere].alias("name")
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
    decimals = short.cast(pl.String).cast(pl.Float64)
    return decimals.zip_with(short.cast(pl.Float64) == values, values) + 0.0


def name_texts(names):
    """Names as the texts of a vocabulary's file: 7 and 7.0 are 7, times as 2020-01-31 12:00:00."""
    if names.dtype != pl.Float64:
        return names.cast(pl.String)
    whole = names.cast(pl.Int128, strict=False)
    is_whole = (whole.cast(pl.Float64) == names).fill_null(False)
    return whole.cast(pl.String).zip_with(is_whole, names.cast(pl.String))


def values_of(texts, kind):
    """The values of `name_texts`, a list of Python's; None for the missing one."""
    if kind in ("number", "boolean"):  # which JSON has in the same form
        return json.loads(f"[{','.join(texts.fill_null('null'))}]")
    if kind == "time":
        texts = texts.str.to_datetime("%F %T%.f", time_unit="us")
    return texts.to_list()


def counted(names):
    """The distinct names of a Series as texts, by first sight, and how often each is there."""
    places, distinct = distinct_of(names)
    counts = np.bincount(places, minlength=len(distinct)).astype(np.uint32)
    return pl.DataFrame({"name": name_texts(distinct), "count": counts})


def numbered(counts, min_count, max_table_rows):
    """(names of ids 1, 2, ...; each entry's id, int32): the most frequent first, ties by first
    sight, the rest 0. counts: DataFrames as of `counted`, whose rows are the entries."""
    entries = pl.concat(counts)
    places, names = distinct_of(entries["name"])
    totals = np.bincount(places, entries["count"], len(names))
    order = np.argsort(-totals, kind="stable")
    order = order[totals[order] >= min_count]
    order = order[: None if max_table_rows is None else max_table_rows - 1]  # id 0 has a row
    ids = np.zeros(len(names), np.int32)
    ids[order] = np.arange(1, len(order) + 1)
    return names.gather(order), ids[places]


def floats(numbers):
    """Numbers as the arrays of a folder hold them, as float64; a missing one is NaN."""
    read = numbers.astype(np.float64)
    if numbers.dtype == np.int32:
        read[numbers == MISSING] = math.nan
    return read


def scale(numbers):
    """[mean, standard deviation] of each column of numbers (N, n), of a constant one [mean, 1].

    They are read three times, BLOCK rows at a time: so it does not matter how a table is cut.
    """
    cuts = [slice(at, at + BLOCK) for at in range(0, len(numbers), BLOCK)]

    def total(function):
        blocks = (np.ascontiguousarray(function(floats(numbers[cut])).T) for cut in cuts)
        sums = [np.nansum(block, axis=1) for block in blocks]
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
    header = b"id,name\n"
    digest, rows, size = hashlib.sha256(header), 1, file.write(header)
    for names in pieces:
        table = pl.DataFrame({"id": np.arange(rows, rows + len(names)), "name": names})
        text = table.write_csv(include_header=False).encode()
        digest.update(text)
        size += file.write(text)
        rows += len(names)
    return {"rows": rows, "bytes": size, "hash": digest.hexdigest()[:16]}


# ---- The encoder ---------------------------------------------------------------------------------


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
        self.kinds = self._given_kinds = dict(kinds)  # by column; fit fixes them
        self.scales, self.about = None, {}  # what `write_names` says of each table
        self._first = int(self.label is not None)

    def columns(self, label="needed", kinds=None):
        """What it reads, in order: label, dense, counts, categorical, multi_hot.

        label: "needed", "welcome" (read if it is there), or "unread". kinds: others than its own.
        """
        kinds = self.kinds if kinds is None else kinds
        name = None if label == "unread" else self.label
        first = [tables.Column(name, measure=True, optional=label != "needed")][: self._first]
        names = [tables.Column(c, bag=c in self.multi_hot, kind=kinds.get(c)) for c in self.tables]
        return first + [tables.Column(c, measure=True) for c in self.numeric] + names

    def place(self, name):
        """Where a table's column stands among `columns`."""
        return self._first + len(self.numeric) + self.tables.index(name)

    def sources(self, rows, columns):
        """The `tables.Source`s of rows, which says what these can be."""
        return tables.sources(rows, columns)

    def fit(self, rows):
        """Learn scales, kinds and names from the training rows alone. Returns self."""
        columns = self.columns(kinds=self._given_kinds)
        sources = self.sources(rows, columns)
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
        limits = self.min_count, self.max_table_rows
        names = {name: numbered(counts[name], *limits)[0] for name in self.tables}
        kinds = {column.name: column.kind for column in columns if not column.measure}
        return self.set_fitted(kinds, scale(numbers), names)

    def set_fitted(self, kinds, scales, names, folder=None):
        """Fix what `fit` found: a kind a table; [mean, deviation] a dense column; the names of each
        table, as texts in order of their ids or as `write_names` said of its file in folder."""
        for column, one in zip(self.dense, scales, strict=True):
            if not np.isfinite(one).all():
                raise FormatError(f"column {column!r}: its numbers are too large to be scaled")
        self.kinds, self.scales, self._folder = dict(kinds), [list(one) for one in scales], folder
        self._texts = {n: each for n, each in names.items() if isinstance(each, pl.Series)}
        told = {n: write_names(io.BytesIO(), [texts]) for n, texts in self._texts.items()}
        self.about, self._vocabularies = names | told, {}
        return self

    @property
    def table_sizes(self):
        """Rows of each embedding table, in the order of categorical and multi_hot."""
        self._require_fit()
        return [self.about[name]["rows"] for name in self.tables]

    def names(self, name):
        """A column's names of ids 1, 2, ... as texts, a polars Series; the missing one is null."""
        self._require_fit()
        if name not in self._texts:
            path = Path(self._folder, self.file_of(name))
            if files.file_hash(path) != self.about[name]["hash"]:
                raise FormatError(f"{path} was changed after it was written")
            self._texts[name] = pl.read_csv(path.read_bytes(), schema=FILE)["name"]
        return self._texts[name]

    def vocabulary(self, name):
        """A column's `Vocabulary`."""
        if name not in self._vocabularies:
            self._vocabularies[name] = Vocabulary(values_of(self.names(name), self.kinds[name]))
        return self._vocabularies[name]

    def _require_fit(self):
        if self.scales is None:
            raise ValueError(f"this {type(self).__name__} has seen no rows; call fit(rows) first")

    def arrays(self, rows):
        """`Arrays` of all rows in order; `tables.sources` says what rows can be."""
        parts = list(self.pieces(rows))
        return parts[0] if len(parts) == 1 else Arrays(*map(_joined, zip(*parts)))

    def pieces(self, rows, label="welcome"):
        """The `Arrays` of a piece of the rows at a time; label: as `columns` has it."""
        self._require_fit()
        columns = self.columns(label)
        for source in self.sources(rows, columns):
            for piece in source.pieces(columns):
                numbers, labels = self.scaled(self.numbers(piece), piece), self.labels(piece)
                bags = {name: self.bags(piece, name) for name in self.tables}
                ids = [self.vocabulary(name).encode(names) for name, (names, _) in bags.items()]
                yield Arrays(numbers, ids, [lengths for _, lengths in bags.values()], labels)

    def numbers(self, piece):
        """The numeric columns of a piece, (B, n) float64, a missing one as NaN."""
        places = range(self._first, self._first + len(self.numeric))
        numbers = piece.frame.select(map(str, places)).fill_null(math.nan).to_numpy(order="c")
        numbers = numbers.reshape(len(piece.frame), len(places))
        infinite = np.isinf(numbers)
        for k in np.flatnonzero(infinite.any(axis=0)).tolist():
            piece.refuse(places[k], infinite[:, k], "infinite")
        return numbers

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
        _refuse_infinite(piece, k)
        names = piece.frame[str(k)]
        if piece.columns[k].bag:
            lengths = names.list.len().fill_null(0).to_numpy().astype(np.int64)
            names = names.filter(lengths > 0).explode()
        return name_form(names), lengths

    def scaled(self, numbers, piece=None):
        """What the model reads of numbers (B, n), float32, a missing one as 0."""
        read, dense = floats(numbers), len(self.dense)
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

    def fingerprint(self):
        """A text that another encoder shares only if it encodes alike."""
        self._require_fit()
        columns = [self.label, self.dense, self.counts, self.categorical, self.multi_hot]
        hashes = [self.about[name]["hash"] for name in self.tables]
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
                    write_names(file, [self.names(name)])
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
        names = [[name, self.about[name]] for name in self.tables]
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


def _joined(parts):
    """Arrays of pieces, or lists of such arrays, one after the other; None where there are none."""
    if isinstance(parts[0], list):
        return [_joined(each) for each in zip(*parts)]
    return None if parts[0] is None else np.concatenate(parts)


def _refuse_infinite(piece, k):
    """FormatError for the first row of column k whose number, or one of whose bag, is infinite."""
    values = piece.frame[str(k)]
    if values.dtype == pl.List(pl.Float64):
        values = values.list.eval(pl.element().abs()).list.max()
    if values.dtype == pl.Float64:
        piece.refuse(k, values.is_infinite(), "infinite")


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
