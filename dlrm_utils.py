"""The companion of DLRM.ipynb: it turns tables of ids and numbers into model input.

    python dlrm_utils.py preprocess data/toy.txt data/toy
    python dlrm_utils.py predict MODEL IN OUT

Shapes: B rows in a batch, N rows in a file, nnz ids in a batch (all bags together).
"""

import argparse
import ast
import collections
import contextlib
import dis
import errno
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import polars.selectors as cs
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

# ---- Sparse-offset converters --------------------------------------------------------------------
# EmbeddingBag's convention: bag b is indices[offsets[b]:offsets[b + 1]]; the last runs to the end.


def to_offsets(bags):
    """Lay ragged bags of ids flat: (indices, offsets), int64 tensors of shape (nnz,) and (B,).

    bags: a sequence of sequences of ints, an array of equal rows, or a pandas Series of lists.
    ValueError, naming the bag, for an id that is no whole number from 0 to 2**63 - 1.
    """
    bags = [bag.tolist() if hasattr(bag, "tolist") else bag for bag in bags]
    for b, bag in enumerate(bags):
        if not isinstance(bag, list | tuple | range):
            raise ValueError(f"bag {b} is {bag!r}, not a sequence of ids; one id is [id]")
    ids = list(itertools.chain.from_iterable(bags))
    whole = not ids or pd.api.types.infer_dtype(ids, skipna=False) == "integer"
    if not whole or min(ids, default=0) < 0 or max(ids, default=0) >= 2**63:
        ids = [_whole(i, b) for b, bag in enumerate(bags) for i in bag]  # slow, but names the bag
    indices = torch.from_numpy(np.array(ids, dtype=np.int64))
    return indices, lengths_to_offsets([len(bag) for bag in bags])


def _whole(i, b):
    number = isinstance(i, int | float | np.integer | np.floating) and not isinstance(i, bool)
    if not number or not 0 <= i < 2**63 or i % 1:
        raise ValueError(f"bag {b} holds {i!r}; an id is a whole number, 0 or more (int64)")
    return int(i)


def to_bags(indices, offsets):
    """The inverse of `to_offsets`, a list of B lists; ValueError for offsets that cannot be."""
    lengths = offsets_to_lengths(offsets, len(indices)).tolist()
    return [bag.tolist() for bag in _int64_vector(indices, "indices").split(lengths)]


def offsets_to_lengths(offsets, nnz):
    """Bag lengths (B,), as TorchRec counts, from offsets (B,) and the number of ids."""
    closed = torch.cat([_int64_vector(offsets, "offsets"), torch.tensor([nnz])])
    lengths = closed.diff()
    if closed[0] != 0:
        raise ValueError(f"the offsets start at {closed[0]}; the first bag starts at 0")
    if (lengths < 0).any():
        b = lengths.argmin()
        end = f"the next, or the end of the indices, is {closed[b + 1]}"
        raise ValueError(f"offsets[{b}] is {closed[b]}, but {end}; offsets never fall")
    return lengths


def lengths_to_offsets(lengths):
    """Offsets (B,) from bag lengths (B,): offsets[b] is the number of ids before bag b."""
    lengths = _int64_vector(lengths, "lengths")
    if (lengths < 0).any():
        raise ValueError(f"lengths[{lengths.argmin()}] is {lengths.min()}; a bag has 0 or more ids")
    return lengths.cumsum(0) - lengths


def _int64_vector(values, name):
    vector = torch.as_tensor(values)
    wrong_type = vector.is_floating_point() or vector.dtype == torch.bool
    if vector.ndim != 1 or (wrong_type and len(vector)):
        raise ValueError(f"{name} must be one row of integers, not {vector.dtype}, {vector.shape}")
    return vector.long()


# ---- Batches -------------------------------------------------------------------------------------


class Batch(collections.namedtuple("Batch", ["dense", "indices", "offsets", "labels"])):
    """Model input for B rows, a named tuple; ValueError if its parts disagree on B.

    dense (B, n_dense) float32; indices: the ids of each table, int64 (nnz,); offsets: where each
    row's bag starts among them, int64 (B,) a table; labels (B,) float32, or None.
    """

    def __new__(cls, dense, indices, offsets, labels=None):
        if len(indices) != len(offsets):
            raise ValueError(f"{len(indices)} tables have ids, but {len(offsets)} have offsets")
        parts = {f"table {t}": starts for t, starts in enumerate(offsets)} | {"labels": labels}
        for name, part in parts.items():
            if part is not None and len(part) != len(dense):
                raise ValueError(f"{name} has {len(part)} rows, but dense has {len(dense)}")
        return super().__new__(cls, dense, indices, offsets, labels)

    def to(self, device):
        """The same batch on another device."""
        ids, starts = ([t.to(device) for t in part] for part in (self.indices, self.offsets))
        labels = None if self.labels is None else self.labels.to(device)
        # Not checked again: TorchRec's batches hold all ids in one object, without offsets.
        return self._replace(
            dense=self.dense.to(device), indices=ids, offsets=starts, labels=labels
        )

    def take(self, rows):
        """The batch of some rows, in that order; `rows` are an index as NumPy reads it."""
        total = len(self.dense)
        rows = torch.from_numpy(_row_numbers(rows, total)).to(self.dense.device)
        following = (rows + 1).clamp(max=total - 1)
        indices, offsets = [], []
        for ids, starts in zip(self.indices, self.offsets, strict=True):
            lengths = torch.where(rows + 1 < total, starts[following], len(ids)) - starts[rows]
            offsets.append(lengths_to_offsets(lengths))
            # Place k of a new bag is place k of its old bag: shift each bag to its old start.
            shift = torch.repeat_interleave(starts[rows] - offsets[-1], lengths)
            indices.append(ids[shift + torch.arange(len(shift), device=shift.device)])
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.dense[rows], indices, offsets, labels)

    def shuffled(self, place):
        """The same rows, but one of their inputs is dealt out anew, by torch's random numbers.

        place: of the input; dense numbers come first, then tables, whose bags stay whole.
        """
        numbers, tables = self.dense.shape[1], len(self.indices)
        if place not in range(numbers + tables):
            raise IndexError(f"input {place} of {numbers} dense numbers and {tables} tables")
        other = self.take(torch.randperm(len(self.dense)))
        if place < numbers:
            dense = self.dense.clone()
            dense[:, place] = other.dense[:, place]
            return self._replace(dense=dense)
        indices, offsets, table = [*self.indices], [*self.offsets], place - numbers
        indices[table], offsets[table] = other.indices[table], other.offsets[table]
        return self._replace(indices=indices, offsets=offsets)


def _row_numbers(rows, total):
    """Which of `total` rows an index means, int64 from 0 to total - 1; IndexError as in NumPy.

    rows: a range, a slice, one number, several (negative ones count from the end), or a mask.
    """
    if isinstance(rows, slice):
        rows = range(*rows.indices(total))
    numbers = np.atleast_1d(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
    numbers = numbers if numbers.size else numbers.astype(np.int64)  # an empty list has no type
    _ = np.broadcast_to(np.int8(0), total)[numbers]  # total rows without memory: NumPy's errors
    return np.flatnonzero(numbers) if numbers.dtype == bool else numbers.astype(np.int64) % total


def one_id_each(dense, ids, labels=None):
    """A `Batch` whose bags hold one id each, from dense (B, n_dense), ids (B,) a table, labels."""
    dense = torch.tensor(np.asarray(dense), dtype=torch.float32)
    indices = [_int64_vector(np.array(column), f"ids of table {t}") for t, column in enumerate(ids)]
    labels = None if labels is None else torch.tensor(np.asarray(labels), dtype=torch.float32)
    return Batch(dense, indices, [torch.arange(len(column)) for column in indices], labels)


# ---- Work that takes long ------------------------------------------------------------------------


def progress(items, **options):
    """The items, under tqdm's bar where they take long; at the end it takes its own line away."""
    in_notebook = "ipykernel" in sys.modules  # there a stored output keeps a bar's traces
    own = {"file": sys.stdout, "delay": 3} if in_notebook else {"file": sys.stderr, "delay": 0.5}
    return tqdm(items, **own | {"leave": False} | options)


def _in_order(function, items, threads):
    """Yield function(item) for each item in order, computed in threads, a few items ahead."""
    pending = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


@contextlib.contextmanager
def _replacing(path):
    """Write to a temporary name beside path; whole and on the disk, it takes path's place."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path):
    """Wait until the disk holds a file, or a folder's names: then a power cut loses nothing."""
    if os.name != "nt":  # Windows has no such call for what is open for reading
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hash_of(content):
    # NumPy's numbers are as Python's; infinity and NaN are not JSON, a ValueError.
    text = json.dumps(content, default=np.generic.item, allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _write_json(path, version, content):
    """Write a dict with its version and fingerprint; `_read_json` refuses any other file."""
    head = {"format": version, "fingerprint": _hash_of(content)}
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(head | content, default=np.generic.item), "utf-8")


def _read_json(path, version):
    """The dict that `_write_json` wrote, or ValueError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found, fingerprint = content.pop("format"), content.pop("fingerprint")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole file of {version}") from error
    if found != version:
        raise ValueError(f"{path} is of another version or kind: {found}, not {version}")
    if fingerprint != _hash_of(content):
        raise ValueError(f"{path} was changed after it was written")
    return content


# ---- Vocabulary ----------------------------------------------------------------------------------


class Vocabulary:
    """Which value has which row of an embedding table.

    Id 0 is for values not seen in `fit`; the more frequent a value, the smaller its id, ties by
    first sight. A missing value (None, NaN, NaT, pd.NA) is a value of its own: None.
    """

    UNKNOWN = "<unknown>"

    def __init__(self, values):
        self.values = list(values)  # of ids 1, 2, 3, ...
        self._index = pd.Index(self.values, dtype=object)

    @classmethod
    def fit(cls, values, min_count=1, max_size=None):
        """Number the values seen min_count times or more, in at most max_size table rows."""
        if min_count < 1 or (max_size is not None and max_size < 1):
            raise ValueError(f"min_count {min_count} and max_size {max_size} must be 1 or more")
        codes, distinct = _distinct(values)
        counts = np.bincount(codes, minlength=len(distinct))
        order = np.argsort(-counts, kind="stable")  # ties by first sight
        kept = order[counts[order] >= min_count]
        return cls(distinct[kept if max_size is None else kept[: max_size - 1]])  # id 0 has a row

    def __len__(self):
        return len(self.values) + 1

    def encode(self, values):
        """Ids of values, int64 of shape (len(values),); 0 where a value is unknown."""
        codes, distinct = _distinct(values)
        # get_indexer says -1 where a value is unknown.
        return (self._index.get_indexer(pd.Index(distinct, dtype=object)) + 1)[codes]

    def decode(self, ids):
        """The values of ids: a list; None for the missing value, `Vocabulary.UNKNOWN` for id 0."""
        ids = _int64_vector(np.asarray(ids), "ids").tolist()
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise ValueError(f"this vocabulary has ids 0 to {len(self) - 1}, not all of {ids}")
        return [self.values[i - 1] if i else self.UNKNOWN for i in ids]


def _distinct(values):
    """(codes, distinct): distinct values by first sight, objects, and the place of each value."""
    if not isinstance(values, pd.Series | pd.Index | np.ndarray):
        values = pd.Series(list(values), dtype=object)
    codes, distinct = pd.factorize(values, use_na_sentinel=False)
    distinct = pd.Series(distinct).astype(object)
    return codes, distinct.where(distinct.notna(), None).to_numpy()


# ---- A DataFrame of one's own --------------------------------------------------------------------

FRAME_VERSION = "dlrm_utils.FrameEncoder 2"
KINDS = {  # what a column can hold, by pandas' names of it
    "empty": None,  # or missing values alone
    "string": "text",
    **dict.fromkeys(["integer", "floating", "mixed-integer-float"], "number"),
    "boolean": "boolean",
    **dict.fromkeys(["datetime64", "datetime", "date"], "time"),
}
TABLE_KINDS, NUMERIC_KINDS = ["text", "number", "boolean", "time"], ["number", "boolean", "decimal"]


class FrameEncoder:
    """Turns a DataFrame into a `Batch`; a column that does not fit is named in a ValueError.

    dense: numeric columns, scaled to mean 0 and standard deviation 1 in `fit`; missing as 0.
    counts: numeric columns with long tails, log(1 + max(x, 0)), after `dense`; missing as 0.
    categorical: one value a row, each a text, a number, a boolean or a time; all rows alike.
    multi_hot: a list of such values a row, a missing one an empty bag.
    label: a column of 0 and 1, put into `Batch.labels` where the frame has it.
    min_count: values seen less often in `fit` are the unknown one, whose row is trained so.
    Frames are pandas' or polars'; a dict or a Series is one row, a dict of lists a frame.
    """

    def __init__(self, dense=(), categorical=(), multi_hot=(), label=None, min_count=1, counts=()):
        self.dense, self.counts = _names(dense), _names(counts)
        self.categorical, self.multi_hot = _names(categorical), _names(multi_hot)
        self.label = None if label is None else _names([label])[0]
        self.min_count = operator.index(min_count)
        self._numeric, self._tables = self.dense + self.counts, self.categorical + self.multi_hot
        for names in (self._numeric, self._tables):
            if len({*names, self.label}) <= len(names):
                raise ValueError(f"a column is named twice among {[*names, self.label]}")
        self.scales, self.kinds, self.vocabularies = None, None, None  # by column, from fit

    def fit(self, frame):
        """Learn scales and vocabularies from the training rows alone. Returns self."""
        frame = self._frame(frame)
        if not len(frame):
            raise ValueError("there are no rows to fit")
        if self.label is not None:
            self._numbers(frame, self.label)
        scales = {column: _scale(self._numbers(frame, column)) for column in self._numeric}
        scales |= dict.fromkeys(self.counts, [0.0, 1.0])
        kinds, vocabularies = {}, {}
        for column in self._tables:
            values, _, kinds[column] = self._bags(frame, column, TABLE_KINDS)
            vocabularies[column] = Vocabulary.fit(values, self.min_count)
        # Only now, so that a fit that fails changes nothing.
        self.scales, self.kinds, self.vocabularies = scales, kinds, vocabularies
        return self

    @property
    def table_sizes(self):
        """Rows of each embedding table, in the order of `Batch.indices`."""
        self._require_fit()
        return [len(vocabulary) for vocabulary in self.vocabularies.values()]

    def transform(self, frame):
        """A `Batch` with the frame's rows in order."""
        self._require_fit()
        frame = self._frame(frame)
        dense, indices, offsets = np.zeros((len(frame), len(self._numeric)), np.float32), [], []
        for k, (column, (mean, deviation)) in enumerate(self.scales.items()):
            dense[:, k] = np.nan_to_num((self._numbers(frame, column) - mean) / deviation)
        for column, vocabulary in self.vocabularies.items():
            fitted = self.kinds[column]
            values, lengths, _ = self._bags(frame, column, [fitted] if fitted else TABLE_KINDS)
            indices.append(torch.from_numpy(vocabulary.encode(values)))
            offsets.append(lengths_to_offsets(lengths))
        labels = None
        if self.label in frame:
            labels = torch.tensor(self._numbers(frame, self.label), dtype=torch.float32)
        return Batch(torch.from_numpy(dense), indices, offsets, labels)

    encode = transform  # as a `FolderEncoder` calls it

    def fingerprint(self):
        """A text that another encoder shares only if it encodes alike."""
        return _hash_of(self._content())

    def save(self, path):
        """Write all that transform needs as JSON."""
        _write_json(path, FRAME_VERSION, self._content())

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; ValueError for any other file."""
        content = _read_json(path, FRAME_VERSION)
        encoder = cls(**content["options"])
        encoder.scales, encoder.kinds = dict(content["scales"]), dict(content["kinds"])
        encoder.vocabularies = {column: Vocabulary(v) for column, v in content["values"]}
        return encoder

    def _content(self):
        self._require_fit()
        names = ("dense", "categorical", "multi_hot", "label", "min_count", "counts")
        # Pairs, since JSON's dicts would make texts of columns whose names are numbers.
        return {
            "options": {name: getattr(self, name) for name in names},
            "scales": list(self.scales.items()),
            "kinds": list(self.kinds.items()),
            "values": [[column, v.values] for column, v in self.vocabularies.items()],
        }

    def _require_fit(self):
        if self.scales is None:
            raise ValueError("this FrameEncoder has seen no frame; call fit(frame) first")

    def _frame(self, rows):
        """What was given as a DataFrame of pandas or polars."""
        if isinstance(rows, dict | pd.Series):
            rows = dict(rows)
            single = [rows.get(name) for name in [*self._numeric, *self.categorical, self.label]]
            many = any(map(pd.api.types.is_list_like, single))
            return pd.DataFrame(rows if many else [rows], dtype=object)
        if not isinstance(rows, pd.DataFrame | pl.DataFrame):
            raise ValueError(f"rows are a DataFrame, a dict or a Series, not {type(rows).__name__}")
        return rows

    def _numbers(self, frame, column):
        """A column as float64, a missing value as NaN; of a count its logarithm."""
        values = _column(frame, column)
        _one_kind(values, NUMERIC_KINDS)
        numbers = values.to_numpy("float64", na_value=np.nan)
        _refuse(values, np.abs(numbers) > np.finfo(np.float32).max, "infinite, or too large")
        if column == self.label:
            _refuse(values, ~np.isin(numbers, [0, 1]), "neither 0 nor 1")
        return np.log1p(np.maximum(numbers, 0)) if column in self.counts else numbers

    def _bags(self, frame, column, kinds):
        """A table's values, one after the other; how many each row has; and their kind."""
        values, lengths = _column(frame, column), np.ones(len(frame), dtype=np.int64)
        if column in self.multi_hot:
            sizes = [
                len(bag) if isinstance(bag, list | tuple | np.ndarray) else -1 for bag in values
            ]
            lengths = np.array(sizes, dtype=np.int64)
            _refuse(values, (lengths < 0) & values.notna(), "not a list of values")
            lengths = lengths.clip(0)  # a missing list is an empty bag
            values = values[lengths > 0].explode()
        kind = _one_kind(values, kinds)
        if kind == "number":
            _refuse(values, values.isin([np.inf, -np.inf]), "infinite")
        if kind == "time":  # dates and times of any type as texts alike; each distinct one once
            values = pd.to_datetime(values).astype("category").cat.rename_categories(str)
        return values, lengths, kind


def _names(names):
    """A list of column names, each a text or a whole number."""
    if isinstance(names, str):
        raise ValueError(f"{names!r} is one name; write [{names!r}]")
    return [name if isinstance(name, str) else operator.index(name) for name in names]


def _column(frame, name):
    """One column as a pandas Series, of objects where its type is neither NumPy's nor text."""
    if list(frame.columns).count(name) != 1:
        found = "several columns" if name in frame.columns else "no column"
        raise ValueError(f"the frame has {found} {name!r}; it has {list(frame.columns)}")
    column = frame[name]
    if isinstance(column.dtype, np.dtype | pd.StringDtype):
        return column.reset_index(drop=True)
    return pd.Series(column.to_list(), dtype=object, name=name)


def _scale(numbers):
    """[mean, standard deviation], of a constant column [mean, 1]."""
    numbers = pd.Series(numbers)
    mean, deviation = np.nan_to_num([numbers.mean(), numbers.std(ddof=0)]).tolist()
    return [mean, deviation if deviation > 1e-12 * abs(mean) else 1.0]  # rounding leaves less


def _one_kind(values, kinds):
    """Which of the kinds all values of a column are, None if all are missing; or ValueError."""
    found = pd.api.types.infer_dtype(values)
    kind = KINDS.get(found, found)
    if kind not in (None, *kinds):
        each = [KINDS.get(pd.api.types.infer_dtype([value]), "other") for value in values]
        _refuse(values, [one not in (None, *kinds) for one in each], f"not a {' or '.join(kinds)}")
        raise ValueError(f"column {values.name!r} mixes {sorted(filter(None, {*each}))}")
    return kind


def _refuse(values, wrong, what):
    """ValueError for the first row of a column that the mask `wrong` marks, if there is one."""
    places = np.flatnonzero(wrong)
    if len(places):
        row, value = next(values.iloc[places[:1]].items())
        raise ValueError(f"column {values.name!r}, row {row!r}: {value!r} is {what}")


# ---- A folder of memory-mapped arrays ------------------------------------------------------------

NUM_DENSE, NUM_TABLES = 13, 26
INTEGERS = [f"I{k + 1}" for k in range(NUM_DENSE)]
CATEGORIES = [f"C{k + 1}" for k in range(NUM_TABLES)]
COLUMNS = ["label", *INTEGERS, *CATEGORIES]
MISSING = np.iinfo(np.int32).min  # how an empty integer field is marked
# Distinct values of the 26 categorical columns in Criteo's Kaggle file, as published.
# fmt: off
CRITEO_KAGGLE_TABLE_SIZES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
# fmt: on
KAGGLE_ROWS = 45_840_617
FOLDER_VERSION, ENCODER_VERSION = "dlrm_utils.criteo 4", "dlrm_utils.FolderEncoder 2"
RUN, RUNS_AT_ONCE = 1024, 256  # neighbouring rows, and how many such runs are mixed
REMAKE = "python dlrm_utils.py preprocess RAW FOLDER"


class CriteoFormatError(ValueError):
    """Raw rows or a processed folder that are not what they should be; the message says where."""


class FolderEncoder:
    """Turns raw rows into a `Batch` by the vocabularies of a processed folder.

    dense: "integer" or "float" for each numeric column; integers become log(1 + max(x, 0)),
    floats sign(x) log(1 + |x|), a missing one 0. categorical: of each column its vocabulary's
    kind ("integer" or "text"), file and table rows. label: a column's name.
    """

    def __init__(self, folder, content):
        self.folder, self.content = Path(folder), content
        self.label, self.dense = content["label"], content["dense"]
        self.categorical, self.criteo = content["categorical"], content["criteo"]
        self.table_sizes = [about["rows"] for about in self.categorical.values()]

    @classmethod
    def load(cls, folder):
        """Open what `save` wrote, or the vocabularies of a processed folder; else ValueError."""
        encoder = cls(folder, _read_json(Path(folder) / "encoder.json", ENCODER_VERSION))
        for about in encoder.categorical.values():
            path = encoder.folder / about["file"]
            if not path.is_file() or path.stat().st_size != about["bytes"]:
                raise ValueError(f"{path.name} is cut or absent")
        return encoder

    def save(self, folder):
        """Copy the vocabularies, so that the processed folder is no longer needed."""
        shutil.copytree(self.folder / "vocabularies", Path(folder) / "vocabularies")
        _write_json(Path(folder) / "encoder.json", ENCODER_VERSION, self.content)

    def fingerprint(self):
        """A hash of columns, kinds and all names: encoders that agree in it encode alike."""
        return _hash_of(self.content)

    def names(self, column):
        """A column's names of ids 1, 2, ..., a polars Series; the missing one is None."""
        about = self.categorical[column]
        path = self.folder / about["file"]
        if _file_hash(path) != about["hash"]:
            raise CriteoFormatError(f"{path} was changed after it was written")
        kind = pl.Int64 if about["kind"] == "integer" else pl.String
        return pl.read_csv(path, schema={"id": pl.Int64, "name": kind})["name"]

    @functools.cached_property
    def _indexes(self):
        return {name: _as_index(self.names(name)) for name in self.categorical}

    def encode(self, rows):
        """A `Batch` of rows, with or without label; ValueError for any that does not fit.

        rows: raw Criteo lines (texts, or one text), or a DataFrame with this encoder's columns.
        """
        if not hasattr(rows, "columns"):
            lines = rows.splitlines() if isinstance(rows, str) else rows
            return self.encode_text("".join(line.rstrip("\r\n") + "\n" for line in lines).encode())
        if isinstance(rows, pd.DataFrame):
            rows = pl.DataFrame(rows.astype(object).where(rows.notna(), None).to_dict("list"))
        frame = (_as_criteo(rows) if self.criteo else rows).with_row_index(ROW, offset=1)
        label = self.label if self.label in frame.columns else None
        columns = _Columns(label, list(self.dense), list(self.categorical), self.criteo)
        return self._batch(_checked_rows(frame, columns, "the frame"))

    def encode_text(self, text, name="lines", first_line=1):
        """A `Batch` of whole raw Criteo lines as bytes."""
        if not self.criteo:
            raise ValueError("raw lines have Criteo's columns; give this encoder a DataFrame")
        labelled = text.split(b"\n", 1)[0].count(b"\t") != len(COLUMNS) - 2
        if not labelled:
            text = b"0\t" + text.removesuffix(b"\n").replace(b"\n", b"\n0\t") + b"\n"
        frame = _parsed(text, name, first_line)
        return self._batch(frame if labelled else frame.drop("label"))

    def _batch(self, frame):
        ids = []
        for name, about in self.categorical.items():
            column = frame[name]
            if column.null_count() < len(column) and _kind_of(column) != about["kind"]:
                found = f"{_kind_of(column)} ({column.dtype}), not {about['kind']}"
                raise ValueError(f"column {name!r} holds {found} as its vocabulary does")
            ids.append(self._indexes[name].get_indexer(_as_index(column)) + 1)
        labels = frame[self.label].to_numpy() if self.label in frame.columns else None
        numbers = _numbers_of(frame, list(self.dense), self.dense)
        return one_id_each(_model_numbers(numbers, self.dense), ids, labels)


def _as_index(names):
    """What pandas looks names up in, or for; a missing one is None."""
    return pd.Index(names.to_list(), dtype=object)


def _kind_of(names):
    return "integer" if names.dtype.is_integer() else "text"


def _numbers_of(frame, names, kinds):
    """The numeric columns, (n, n_dense): int32 if all are integers, else float64."""
    whole = set(kinds.values()) <= {"integer"}
    dtype, missing = (pl.Int32, MISSING) if whole else (pl.Float64, math.nan)
    columns = frame.select(pl.col(names).cast(dtype).fill_null(missing))
    return columns.to_numpy(order="c").reshape(len(frame), len(kinds))


def _model_numbers(numbers, kinds):
    """What the model reads, float32; of integers log(1 + max(x, 0)), a missing one as 0."""
    if numbers.dtype == np.int32:
        return np.log1p(np.maximum(numbers, 0).astype(np.float32))
    numbers = np.nan_to_num(numbers)
    counts = [kind == "integer" for kind in kinds.values()]
    numbers[:, counts] = np.maximum(numbers[:, counts], 0)
    return (np.sign(numbers) * np.log1p(np.abs(numbers))).astype(np.float32)


class CriteoData:
    """Rows on disk, in the raw file's order; nothing is read before it is asked for.

    labels (N,) uint8; dense (N, n_dense) int32 as read, `MISSING` where empty, or float64 and NaN
    where a column has fractions; sparse (N, tables) int32 ids. table_sizes: an int a table.
    train, test, validation: ranges of rows, of one file blocks 1 to 6, the first and the second
    half of block 7. block_offsets: the 8 bounds of the blocks. source: what it was made from.
    encoder: a `FolderEncoder`, which turns raw rows into a `Batch`.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        about = _read_json(self.path / "source.json", FOLDER_VERSION)
        self.source = about["source"]
        self.encoder = FolderEncoder.load(self.path)
        self.table_sizes, self.encode = self.encoder.table_sizes, self.encoder.encode
        self.labels, self.dense, self.sparse = (
            _mapped(self.path / f"{name}.npy", *about["arrays"][name])
            for name in ("labels", "dense", "sparse")
        )
        self.block_offsets = [*_bounds(about["train_rows"], 6), len(self)]
        first, last = self.block_offsets[6:]
        middle = (first + last + 1) // 2
        self.train, self.test = range(first), range(first, middle)
        self.validation = range(middle, last)

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):  # a worker process opens the folder again, it is sent no arrays
        return load_criteo, (self.path.absolute(),)

    def fingerprint(self):
        """A hash of rows, options and vocabularies: a training goes on with the same one alone."""
        return _hash_of([self.source, self.encoder.fingerprint()])

    def batch(self, rows):
        """A `Batch` of rows (a range, a slice, numbers, a mask) ready for the model."""
        rows = _row_numbers(rows, len(self))
        dense = _model_numbers(self.dense[rows], self.encoder.dense)
        return one_id_each(dense, self.sparse[rows].T, self.labels[rows])

    def read_ahead(self, rows):
        """Read whole runs of rows once, so that the system holds their pages.

        The memory map alone would fetch them one by one, ten times as slow from a cold disk.
        """
        runs = np.unique(_row_numbers(rows, len(self)) // RUN).tolist()
        for array in (self.labels, self.dense, self.sparse):
            size = RUN * array.strides[0]
            with open(array.filename, "rb", buffering=0) as file:
                for run in runs:
                    file.seek(array.offset + run * size)
                    file.read(size)


def _mapped(path, dtype, shape):
    array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or list(array.shape) != shape:
        raise ValueError(f"{path.name} holds {array.dtype} of shape {array.shape}")
    return array


def _bounds(rows, blocks):
    """Bounds of equal blocks of rows, the first rows % blocks of them one row longer."""
    size, longer = divmod(rows, blocks)
    return [b * size + min(b, longer) for b in range(blocks + 1)]


def shuffled_rows(rows, seed):
    """Row numbers in a random order that suits a file larger than memory, (len(rows),) int64.

    Runs of 1,024 neighbouring rows are put in random order; then the rows of each 256 runs, 41 MB
    of the file, are mixed. Up to 262,144 rows this is any permutation.
    """
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, len(rows), RUN))
    order = (starts[:, None] + np.arange(RUN)).ravel()
    order = order[order < len(rows)]  # the last run of the file may be shorter
    for start in range(0, len(order), RUN * RUNS_AT_ONCE):
        rng.shuffle(order[start : start + RUN * RUNS_AT_ONCE])
    return rows.start + rows.step * order if isinstance(rows, range) else np.asarray(rows)[order]


def shuffled_batches(get_batch, rows, batch_size, num_epochs=1, seed=0, start=0, stop=None):
    """Yield (step, done, get_batch(some rows)) for the steps start to stop of num_epochs.

    done is the share of the training before the step. The order of an epoch follows from seed and
    its number alone, so a training can go on in the middle. `CriteoData.batch` reads ahead.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least one row")
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    total = num_epochs * steps_per_epoch
    stop = total if stop is None else min(stop, total)
    read_ahead = getattr(getattr(get_batch, "__self__", None), "read_ahead", None)
    order, mixed, read = None, RUN * RUNS_AT_ONCE, 0
    for step in progress(range(start, stop), desc="training", unit="step"):
        epoch, place = divmod(step, steps_per_epoch)
        first, last = place * batch_size, min((place + 1) * batch_size, len(rows))
        if order is None or place == 0:
            order, read = shuffled_rows(rows, [seed, epoch]), first // mixed * mixed
        while read_ahead and read < last:
            read_ahead(order[read : read + mixed])
            read += mixed
        yield step, step / total, get_batch(order[first:last])


def load_criteo(processed_folder):
    """Open a processed folder, whatever its size, in milliseconds, or raise CriteoFormatError."""
    folder = Path(processed_folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}; run {REMAKE}")
    if not folder.is_dir():
        raise CriteoFormatError(f"{folder} is a file, not a processed folder; {REMAKE} makes one")
    try:
        return CriteoData(folder)
    except (ValueError, FileNotFoundError) as error:  # no other error tells of what it holds
        found = f"{folder} is not a whole processed Criteo folder of this version ({error})"
        raise CriteoFormatError(f"{found}; make one at another place: {REMAKE}") from error


# ---- From any table to the folder ----------------------------------------------------------------
# Stage 1 checks what it reads and writes it as Parquet files, columns named by their places; stage
# 2 makes a vocabulary and the ids of each column; stage 3, the arrays. A stopped run goes on.

PIECE = 1 << 24  # bytes of text parsed together
PIECE_ROWS = 1 << 17  # rows of a table, or of the arrays, that are handled together
ROW = "dlrm_utils.row"  # the column of row numbers; polars' own end at 2**32
LOCK, STAGES = "dlrm_utils.lock", "dlrm_utils.stages"  # all that we write in FOLDER.making
STAGE_VERSION = "Parquet 1"  # stages of another form are not gone on from
ENGINE_MEMORY = "4GB"  # what DuckDB may hold of a column's names; more of them go to the disk
ENGINE_THREADS = min(os.cpu_count() or 1, 8)  # each needs its share of that memory
COUNT = """CREATE OR REPLACE TABLE known AS
SELECT "{}" AS name, count(*) FILTER (row < $train_rows) AS count, min(row) AS first_row
FROM stored GROUP BY name"""
NUMBER = """CREATE OR REPLACE TABLE kept AS
SELECT name FROM known WHERE count >= $min_count ORDER BY count DESC, first_row
LIMIT $max_table_rows - 1"""
LOOK_UP = """SELECT row, kept.rowid + 1 AS id
FROM stored JOIN kept ON "{}" IS NOT DISTINCT FROM kept.name"""


class _Columns(NamedTuple):
    label: str  # None for rows without
    dense: list
    categorical: list
    criteo: bool = False  # then floats without a fraction are integers, as in Criteo's own file

    def names(self):
        return [*([] if self.label is None else [self.label]), *self.dense, *self.categorical]


def preprocess_table(
    table, processed_folder, dense, categorical, label, min_count=1, max_table_rows=None,
    progress=True,
):  # fmt: skip
    """Turn any table into a folder of arrays, with bounded memory, and open it as `CriteoData`.

    table: a polars LazyFrame or DataFrame, or a path or several: .parquet or .csv, with a header.
    dense: numeric columns; categorical: texts, integers, booleans, dates; label: 0 or 1. A CSV's
    categories are texts. The vocabularies come from the training rows: of one table the first six
    sevenths, of several files all but the last. The options are those of `preprocess_criteo`.
    """
    columns = _Columns(label, list(dense), list(categorical))
    if len(set(columns.names())) < len(columns.names()):
        raise ValueError(f"a column is named twice among {columns.names()}")
    options = _options(min_count, max_table_rows)
    return _preprocess(table, Path(processed_folder), columns, options, progress)


def preprocess_criteo(
    raw_data_file, processed_folder, min_count=1, max_table_rows=None, progress=True
):
    """Turn Criteo rows, a path or several in order, into a folder of arrays and open it.

    raw_data_file: tab-separated label, 13 integers, 26 categories of 8 hex digits, empty where
    missing; plain, .gz, or train.txt in a .tar.gz. Or a .csv or .parquet with columns label,
    I1 to I13, C1 to C26, in any capitals. Of several files the last is test and validation.
    processed_folder: opened if made before from the same rows and options, else refused.
    min_count, max_table_rows: categories seen less often in the training part, or beyond that many
    table rows, become id 0. A run that was stopped goes on from processed_folder + ".making".
    CriteoFormatError, naming file, line and column, for a malformed line; for under 7 rows.
    """
    columns = _Columns("label", INTEGERS, CATEGORIES, criteo=True)
    options = _options(min_count, max_table_rows)
    return _preprocess(raw_data_file, Path(processed_folder), columns, options, progress)


def _options(min_count, max_table_rows):
    """The options as Python's integers, or ValueError before any work is done."""
    options = {"min_count": min_count}
    if max_table_rows is not None:
        options["max_table_rows"] = max_table_rows
    for name, value in options.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be 1 or more")
    return {name: int(value) for name, value in options.items()}


def _preprocess(rows, folder, columns, options, show):
    """Make the folder, unless it is there, and open it."""
    prints, readers = _sources(rows, columns)
    source = {"files": prints, "columns": list(columns[:3]), **options}
    work = folder.with_name(f"{folder.name}.making")
    if work.exists() or not _in_use(folder):
        with _alone(work):
            if not _in_use(folder):  # another process may just have made it
                stages = work / STAGES / _hash_of([FOLDER_VERSION, STAGE_VERSION, source])
                _make(readers, folder, stages, columns, source, show)
    data = load_criteo(folder)
    if data.source != source:
        raise ValueError(f"{folder} was made from {data.source}, not {source}; name another folder")
    return data


def _sources(rows, columns):
    """Of a table or each of several files: its fingerprint, and its checked rows to come."""
    if isinstance(rows, pl.DataFrame | pl.LazyFrame):
        lazy = rows.lazy()
        reader = _table_rows(lazy, columns, "the table")
        return [_rows_hash(lazy.select(columns.names()))], [reader]
    paths = [Path(path) for path in (rows if isinstance(rows, list | tuple) else [rows])]
    if not paths:
        raise ValueError("there is no raw file to read: the list is empty")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no raw file {path}; see data/README.md")
        if path.stat().st_size == 0:
            raise CriteoFormatError(f"{path} is empty: 0 rows")
    readers = []
    for path in paths:
        if not columns.criteo or _is_table(path):
            readers.append(_table_rows(_scanned(path), columns, path))
        else:
            if len(paths) > 1:
                _check_end(path)
            readers.append(_text_rows(path))
    return [_fingerprint(path) for path in paths], readers


def _fingerprint(path):
    """A hash of a file up to 64 MB. Of a larger one: size, time of change and 256 pieces, so that
    an edit which keeps the size, sets the time back and misses the pieces is not noticed."""
    size, digest = path.stat().st_size, hashlib.sha256()
    pieces, length = [0], size
    if size > 64 << 20:
        digest.update(str(path.stat().st_mtime_ns).encode())
        pieces, length = [(size - 4096) * k // 255 for k in range(256)], 4096
    with open(path, "rb") as file:
        for start in pieces:
            file.seek(start)
            digest.update(file.read(length))
    return f"{size} bytes {digest.hexdigest()[:16]}"


def _rows_hash(lazy):
    """A hash of a table's rows and their order, found by reading it once."""
    numbered = lazy.with_row_index(ROW).select(pl.struct(pl.all()).hash().bitwise_xor())
    return f"rows {numbered.collect(engine='streaming').item()}"


def _in_use(path):
    return path.is_file() or (path.exists() and any(path.iterdir()))


@contextlib.contextmanager
def _alone(work):
    """Hold the lock in `work`; afterwards our stages go, unless they are worth going on from."""
    if work.exists() and {path.name for path in work.iterdir()} - {LOCK, STAGES}:
        raise CriteoFormatError(f"{work} is in the way; move it, or name another folder")
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / LOCK).acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"another process is making what {work} is for; wait for it") from None
    with lock:
        try:
            yield
        except CriteoFormatError:  # what was read of these rows is of no use
            _tidy(work)
            raise
        except (OSError, pl.exceptions.PolarsError, duckdb.Error) as error:
            # Only the first has a number; DuckDB stops before nothing is left.
            if re.search("No space left on device|max_temp_directory_size", str(error)):
                full = f"the disk is full; make room, run this again: {work} is kept ({error})"
                raise OSError(errno.ENOSPC, full) from error
            raise
        _tidy(work)


def _tidy(work):
    """Remove what we made; the lock goes last, since it shows whose the rest is."""
    shutil.rmtree(work / STAGES, ignore_errors=True)
    (work / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else put a file there
        work.rmdir()


def _make(readers, folder, stages, columns, source, show):
    """Do what the stages lack, and put the whole folder at its place."""
    ends = [0]
    for k, frames in enumerate(readers):
        done = stages / "parts" / f"{k:06}"
        if not done.exists():
            bar = progress(frames, desc=f"reading {k + 1} of {len(readers)}", disable=not show)
            _store(bar, done, ends[-1])
        ends.append(ends[-1] + sum(len(_stored(part, ["0"])) for part in done.iterdir()))
    *_, before_last, rows = ends
    if rows < 7 or len(set(ends)) < len(ends):
        found = f"{rows} rows in files that end at {ends[1:]}"
        raise CriteoFormatError(f"{found}; one file needs 7 rows, each of several one")
    train_rows = _bounds(rows, 7)[6] if len(readers) == 1 else before_last
    parts = sorted((stages / "parts").glob("*/*"))
    described = {}
    bar = progress(columns.categorical, desc="numbering categories", disable=not show)
    places = {name: str(place) for place, name in enumerate(columns.names())}
    with _engine(parts, stages / "spilled") as engine:
        for k, name in enumerate(bar):
            counts = (train_rows, rows)
            described[name] = _number_column(engine, stages, k, places[name], counts, source)
    schemas = [pl.scan_parquet(part, glob=False).collect_schema() for part in parts]
    dense = {}
    for name in columns.dense:
        whole = all(schema[places[name]] == pl.Int32 for schema in schemas)
        dense[name] = "integer" if whole else "float"
    content = {"label": columns.label, "dense": dense, "criteo": columns.criteo}
    content["categorical"] = described
    arrays = _write_arrays(stages, parts, rows, content, show)
    data = stages / "data"
    _write_json(data / "encoder.json", ENCODER_VERSION, content)
    about = {"source": source, "train_rows": train_rows, "arrays": arrays}
    _write_json(data / "source.json", FOLDER_VERSION, about)
    for path in [*data.iterdir(), data]:
        _flush(path)
    if folder.exists():
        folder.rmdir()  # an empty one
    os.rename(data, folder)
    _flush(folder.parent)


def _store(frames, done, row):
    """Stage 1: a file for each frame, their rows numbered from `row`, in the folder `done`.

    Columns are named by their places: any name is one in Parquet, but DuckDB knows no capitals.
    """
    unfinished = done.parent.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for k, frame in enumerate(frames):
        path = unfinished / f"{k:09}"
        places = {name: str(place) for place, name in enumerate(frame.columns)}
        numbered = frame.rename(places).with_columns(row=pl.int_range(row, row + len(frame)))
        numbered.write_parquet(path, compression_level=1, statistics=False)  # by zstd
        _flush(path)
        row += len(frame)
    _flush(unfinished)
    done.parent.mkdir(exist_ok=True)
    os.rename(unfinished, done)


@contextlib.contextmanager
def _engine(parts, spilled):
    """DuckDB with the files of stage 1 as `stored`; what memory cannot hold goes to `spilled`."""
    shutil.rmtree(spilled, ignore_errors=True)  # of a run that was stopped
    options = {"memory_limit": ENGINE_MEMORY, "threads": ENGINE_THREADS}
    options |= {"temp_directory": str(spilled)}
    with duckdb.connect(config=options) as engine:
        engine.read_parquet([glob.escape(str(part)) for part in parts]).create_view("stored")
        yield engine


def _number_column(engine, stages, k, place, counts, source):
    """Stage 2: a column's vocabulary, counted on the training rows, and the ids of all rows.

    The more frequent a name, the smaller its id, ties by first sight. Memory follows the distinct
    names, not the rows; what goes beyond `ENGINE_MEMORY` goes to the disk.
    """
    done = stages / "ids" / f"{k}.json"
    if done.exists():
        return json.loads(done.read_text())
    train_rows, rows = counts
    engine.execute(COUNT.format(place), {"train_rows": train_rows})
    limits = {"max_table_rows": 2**31, **source}
    limits = {name: limits[name] for name in ("min_count", "max_table_rows")}
    engine.execute(NUMBER, limits)
    known, kept = engine.table("known"), engine.table("kept")
    hexadecimal = kept.types[0] == "UINTEGER"  # as eight digits, as in Criteo's text
    text = "printf('%08x', name) AS name" if hexadecimal else "name"
    texts = kept.select("rowid + 1 AS id, " + text)
    path = stages / "data" / "vocabularies" / f"C{k + 1}.csv"
    with _replacing(path) as temporary:
        texts.write_csv(str(temporary))
    _write_ids(engine, done.with_suffix(".npy"), place, rows)
    about = {"file": f"vocabularies/{path.name}", "bytes": path.stat().st_size}
    about |= {"kind": "integer" if texts.types[1] == "BIGINT" else "text"}
    about |= {"hash": _file_hash(path), "rows": len(kept) + 1, "distinct": len(known)}
    with _replacing(done) as temporary:
        temporary.write_text(json.dumps(about))
    return about


def _write_ids(engine, path, place, rows):
    """The ids of a column as found, in any order; of an unknown name none is: it stays 0."""
    _save(path, "<i4", [rows], (np.zeros(cut.stop - cut.start) for cut in _cuts(rows)))
    ids, found = np.load(path, mmap_mode="r+"), engine.execute(LOOK_UP.format(place))
    while len(piece := found.fetch_df_chunk(64)):
        ids[piece["row"]] = piece["id"]
    ids.flush()


def _stored(part, places):
    return pl.read_parquet(part, columns=places, glob=False)


def _cuts(rows):
    return [slice(start, min(start + PIECE_ROWS, rows)) for start in range(0, rows, PIECE_ROWS)]


def _write_arrays(stages, parts, rows, content, show):
    """Stage 3: labels, numbers and ids, row by row; returns the type and shape of each array."""
    dense, tables = content["dense"], len(content["categorical"])
    columns = [np.load(stages / "ids" / f"{k}.npy", mmap_mode="r") for k in range(tables)]
    labels = (_stored(part, ["0"])["0"].to_numpy() for part in parts)
    places = [str(place) for place in range(1, len(dense) + 1)]
    numbers = (_numbers_of(_stored(part, ["0", *places]), places, dense) for part in parts)
    ids = (np.array([column[cut] for column in columns]).T for cut in _cuts(rows))
    number_type = "<i4" if set(dense.values()) <= {"integer"} else "<f8"
    arrays = {
        "labels": ("|u1", [rows], labels),
        "dense": (number_type, [rows, len(dense)], numbers),
        "sparse": ("<i4", [rows, tables], ids),
    }
    for name, (dtype, shape, pieces) in arrays.items():
        path = stages / "data" / f"{name}.npy"
        if not path.exists():
            _save(path, dtype, shape, progress(pieces, desc=f"writing {name}", disable=not show))
    return {name: [dtype, shape] for name, (dtype, shape, _) in arrays.items()}


def _save(path, dtype, shape, pieces):
    """Write a .npy file piece by piece."""
    header = {"descr": dtype, "fortran_order": False, "shape": tuple(shape)}
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


# ---- Reading tables ------------------------------------------------------------------------------

DAMAGE = (pl.exceptions.PolarsError, EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error)


@contextlib.contextmanager
def _damage_named(place):
    """What a damaged or mistaken file gives, as a CriteoFormatError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise CriteoFormatError(f"{place} is damaged, or misnamed: {error}") from error


def _is_table(path):
    return path.suffix in (".csv", ".parquet")


def _scanned(path):
    """A LazyFrame of a .parquet, or of any other file as CSV, all of whose fields are texts."""
    with open(path, "rb") as file:
        start = file.readline(1 << 16)
    if path.suffix != ".parquet" and b"\0" in start:
        raise CriteoFormatError(f"{path} is no text; unpack archives, name a table .parquet")
    with _damage_named(path):
        if path.suffix == ".parquet":
            lazy = pl.scan_parquet(path, glob=False)
        else:
            options = {"infer_schema": False, "null_values": "", "glob": False}
            lazy = pl.scan_csv(path, separator="\t" if b"\t" in start else ",", **options)
        for name in lazy.collect_schema():
            if name.endswith("_duplicated_0"):
                twice = name.removesuffix("_duplicated_0")
                raise CriteoFormatError(f"{path}: its header names {twice!r} twice")
    return lazy


def _as_criteo(frame):
    """A table's columns in Criteo's capitals; its categories as text in small letters, or integers.

    Floats are integers too, among which some miss, as pandas reads them.
    """
    names = {name.lower(): name for name in COLUMNS}
    frame = frame.rename(lambda name: names.get(name.lower(), name))
    categories = cs.by_name(CATEGORIES, require_all=False)
    texts = (categories & cs.string()).str.to_lowercase().replace("", None)
    return frame.with_columns(texts, (categories & cs.float()).cast(pl.Int64))


def _batches(lazy, place):
    """The rows in order, a DataFrame at a time."""
    with _damage_named(place):
        yield from lazy.collect_batches(chunk_size=PIECE_ROWS, maintain_order=True)


def _table_rows(lazy, columns, place):
    """A table's checked rows to come, a DataFrame at a time; their types are looked at now."""
    if columns.criteo:
        lazy = _as_criteo(lazy)
    with _damage_named(place):
        empty = pl.DataFrame(schema=lazy.collect_schema())
    _checked_rows(empty, columns, place)
    batches = _batches(lazy.select(columns.names()).with_row_index(ROW, offset=1), place)
    return (_checked_rows(frame, columns, place) for frame in batches)


def _checked_rows(frame, columns, place):
    """Label, numbers and names in the types of stage 1, or CriteoFormatError."""
    made = {}
    for name in columns.names():
        if name not in frame.columns:
            raise CriteoFormatError(f"{place} has no column {name!r}; it has {frame.columns}")
        column = frame[name].fill_nan(None) if frame[name].dtype.is_float() else frame[name]
        if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
            raise CriteoFormatError(f"{place}, column {name!r}: {column.dtype} is not one value")
        if name in columns.categorical:
            whole = column.dtype.is_integer() and column.dtype != pl.UInt64
            made[name] = column.cast(pl.Int64 if whole else pl.String)
            continue
        # A date is no number, though polars would make one of it.
        plain = column.cast(pl.String) if column.dtype.is_temporal() else column
        numbers = plain.cast(pl.Float64, strict=False)
        if name == columns.label:
            wrong, what = ~numbers.is_in([0.0, 1.0]).fill_null(False), "not a label, 0 or 1"
            dtype = pl.UInt8
        else:
            wrong = column.is_not_null() & ~numbers.is_finite().fill_null(False)
            what = "not a finite number"
            whole = ((numbers == numbers.round()) & (numbers.abs() < 2**31)).all()
            stays = column.dtype.is_float() and not columns.criteo
            dtype = pl.Int32 if whole and not stays else pl.Float64
        if wrong.any():
            row = wrong.arg_true()[0]
            found = f"{place}, row {frame[ROW][row]}, column {name!r}: {column[row]!r}"
            raise CriteoFormatError(f"{found} is {what}")
        made[name] = numbers.cast(dtype)
    return pl.DataFrame(made)


# ---- Reading Criteo's text -----------------------------------------------------------------------

FIELDS = {"l": "[01]", "I": "(?:-?[0-9]{1,9})?", "C": "(?:[0-9a-fA-F]{8})?"}
WANTED = {"l": "a label, 0 or 1", "I": "a 32-bit integer", "C": "a category of 8 hex digits"}
TYPES = {"l": pl.UInt8, "I": pl.Int32, "C": pl.String}
LINE = "^" + "\t".join(FIELDS[column[0]] for column in COLUMNS) + "$"
SCHEMA = {column: TYPES[column[0]] for column in COLUMNS}
PACKED = (".gz", ".tgz")
TABLE_HINT = "; a table with a header is known by .csv or .parquet, a .zip has to be unpacked"


def _check_end(path):
    """Look at the last line, and through a packed file: a cut one is found before hours of work."""
    line = b""
    with _unpacked(path) as file:
        if path.suffix not in PACKED:
            file.seek(max(path.stat().st_size - PIECE, 0))
        for _, text in _pieces(file, path):
            line = text.removesuffix(b"\n").rsplit(b"\n", 1)[-1]
    _check_line(line, f"{path}, last line")


def _text_rows(path):
    """The checked rows of Criteo's text; hex digits become numbers, which take less disk."""
    numbers = pl.col(CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32)

    def parse(piece):
        first_line, text = piece
        return _parsed(text, path, first_line).with_columns(numbers)

    with _unpacked(path) as file:
        yield from _in_order(parse, _pieces(file, path), threads=3)


@contextlib.contextmanager
def _unpacked(raw):
    """The raw file, open; its bytes are those of the plain text."""
    with _damage_named(raw):
        if raw.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(raw, "r|gz") as archive:
                for member in archive:
                    if Path(member.name).name == "train.txt":
                        yield archive.extractfile(member)
                        return
            raise tarfile.ReadError("it holds no train.txt")
        with gzip.open(raw) if raw.suffix == ".gz" else open(raw, "rb") as file:
            yield file


def _pieces(file, name):
    """The text in pieces of whole lines: (number of the first line, bytes)."""
    line = 1
    while text := file.read(PIECE):
        rest = file.readline(PIECE)
        if len(rest) == PIECE and not rest.endswith(b"\n"):
            line += text.count(b"\n")
            raise CriteoFormatError(f"{name}, line {line}, column 1: over {PIECE:,} bytes long")
        yield line, text + rest
        line += text.count(b"\n") + rest.count(b"\n")


def _parsed(text, name, first_line):
    """A DataFrame with the columns of SCHEMA from whole lines as bytes, or CriteoFormatError."""
    if text and not (text.isascii() and pl.read_lines(text)["line"].str.contains(LINE).all()):
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), first_line):
            _check_line(line, f"{name}, line {number}")
    options = {"separator": "\t", "has_header": False, "quote_char": None, "raise_if_empty": False}
    return pl.read_csv(text.lower(), schema=SCHEMA, **options)


def _check_line(line, place):
    """Name the first field that is not what it should be; slower than LINE, it knows more."""
    line = line.removesuffix(b"\r").decode("ascii", "replace")
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        found = f"{line[:40]!r} has {len(fields)} fields, not {len(COLUMNS)}{TABLE_HINT}"
        raise CriteoFormatError(f"{place}, column {min(len(fields), len(COLUMNS))}: {found}")
    for k, (column, field) in enumerate(zip(COLUMNS, fields, strict=True), start=1):
        kind = column[0]
        ten_digits = kind == "I" and re.fullmatch("-?[0-9]{10}", field)
        sound = abs(int(field)) < 2**31 if ten_digits else re.fullmatch(FIELDS[kind], field)
        if not sound:
            hint = TABLE_HINT if kind == "l" else ""
            found = f"{field[:40]!r} is not {WANTED[kind]}{hint}"
            raise CriteoFormatError(f"{place}, column {k} ({column}): {found}")


# ---- The notebook's own definitions --------------------------------------------------------------

IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (*IMPORTS, ast.FunctionDef, ast.ClassDef)


def load_notebook(path="DLRM.ipynb"):
    """A namespace of the notebook's imports, functions, classes, plain constants in capitals
    (`SIZE = 3`), and of the cells tagged `example`.

    Nothing else of it runs. A relative path starts at this file. What an absent package would
    define is left out.
    """
    path = Path(__file__).resolve().parent / path
    namespace, absent = {"__name__": path.name}, set()
    for statement, example in _statements(path):
        code = compile(ast.Module([statement], []), path.name, "exec")
        steps = dis.get_instructions(code)
        defined = {step.argval for step in steps if step.opname == "STORE_NAME"}
        constant = _is_constant(statement, namespace.keys() | defined)
        if not (example or constant or isinstance(statement, DEFINITIONS)):
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
        except (ModuleNotFoundError, NameError) as error:
            if error.name not in absent and not isinstance(statement, IMPORTS):
                raise
            absent |= defined
    return types.SimpleNamespace(**namespace)


def _statements(path):
    """The statements of all cells, and whether each is of an example; lines as %time are none."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = re.sub("^[%!].*", "", "".join(cell["source"]), flags=re.MULTILINE)
        if cell["cell_type"] == "code":
            for statement in ast.parse(source).body:
                yield statement, "example" in cell["metadata"].get("tags", [])


def _is_constant(statement, known):
    """Is it NAME = something of literals and known names, all in capitals and none called?"""
    nodes = list(ast.walk(statement))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    capitals = all(map(str.isupper, names)) and names <= known
    return isinstance(statement, ast.Assign) and capitals and ast.Call not in map(type, nodes)


# ---- Saved models --------------------------------------------------------------------------------

MODEL_VERSION = "dlrm_utils.save_model 2"
MODEL_FILES = {"settings.json", "weights.pt", "encoder"}


def save_model(folder, model_settings, model, encoder):
    """Write a folder that `load_model` opens anywhere; it takes the place of an older one.

    model_settings: the class's name in the notebook and its arguments without table_sizes, as
    {"class": "DLRM", "embedding_dim": 16, "bottom_mlp": [64], "top_mlp": [64], "num_dense": 13}.
    encoder: a fitted `FrameEncoder`, or the `CriteoData` that the model was trained on.
    ValueError if they do not belong together, or if the folder holds anything else.
    """
    folder, encoder = Path(folder), getattr(encoder, "encoder", encoder)
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found and found != MODEL_FILES:
        raise ValueError(f"{folder} holds what save_model did not write; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        new, old = Path(work, "new"), Path(f"{work}.old")
        new.mkdir()
        encoder.save(new / "encoder")  # one file, or a folder
        torch.save(model.state_dict(), new / "weights.pt")
        settings = {"model": model_settings | {"class": type(model).__name__}}
        settings |= {"encoder": encoder.fingerprint(), "weights": _file_hash(new / "weights.pt")}
        _write_json(new / "settings.json", MODEL_VERSION, settings)
        load_model(new)  # what does not open takes no place
        for path in [*new.rglob("*"), new]:
            _flush(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder):
    """Open what `save_model` wrote: (model, encoder), the model on the CPU and in `eval` mode.

    FileNotFoundError where there is no folder; ValueError if it is cut, foreign, of another
    version, or of parts that do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    weights, place = folder / "weights.pt", folder / "encoder"
    try:
        settings = _read_json(folder / "settings.json", MODEL_VERSION)
        encoder = (FolderEncoder if place.is_dir() else FrameEncoder).load(place)
        parts = {"encoder": encoder.fingerprint(), "weights": _file_hash(weights)}
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a whole folder of save_model: {error}") from error
    for name, fingerprint in parts.items():
        if settings[name] != fingerprint:
            raise ValueError(f"{folder}: its {name} part is cut, or that of another model")
    return _built(settings["model"], encoder.table_sizes, weights).eval(), encoder


def _built(settings, table_sizes, weights):
    """The notebook's model of these settings with these weights, or ValueError."""
    arguments = {name: value for name, value in settings.items() if name != "class"}
    with torch.random.fork_rng(devices=[]):  # what is drawn does not move the caller's seed
        kind = getattr(load_notebook(), settings["class"], None)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):  # call nothing else
            raise ValueError(f"the notebook has no such model as {settings['class']!r}")
        try:
            model = kind(table_sizes, **arguments)
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"the notebook has no such model as {settings}: {error}") from error
    return model


# ---- Commands ------------------------------------------------------------------------------------


def predict_file(model_folder, rows, out):
    """Write one probability a row of a file to `out`, batch by batch; returns the rows' number.

    They lie in out + ".part" until all are there, also after an error, which says how many.
    """
    rows, out, scored = Path(rows), Path(out), 0
    model, encoder = load_model(model_folder)
    rows.stat()  # FileNotFoundError before anything is written
    if out.is_dir() or out.absolute() == rows.absolute():
        raise ValueError(f"{out} is in the way; name another file for the probabilities")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    with open(part, "w", encoding="ascii") as file:
        try:
            for batch in progress(_encoded(encoder, rows), desc=f"scoring {rows.name}"):
                with torch.inference_mode():
                    probability = torch.sigmoid(model(*batch[:3])).tolist()
                file.writelines(f"{p:.9g}\n" for p in probability)
                scored += len(probability)
        except ValueError as error:
            raise ValueError(f"{error}; {scored:,} rows before it are kept in {part}") from error
    os.replace(part, out)
    return scored


def _encoded(encoder, path):
    """A file's rows as batches: raw lines, or a table with the encoder's columns."""
    criteo = isinstance(encoder, FolderEncoder) and encoder.criteo
    if criteo and not _is_table(path):
        with _unpacked(path) as file:
            for line, text in _pieces(file, path):
                yield encoder.encode_text(text, path, line)
        return
    lazy = _scanned(path)
    numbers, schema = _number_types(encoder), lazy.collect_schema()
    texts = [name for name in numbers if schema.get(name) == pl.String]  # of a CSV all are
    for frame in _batches(lazy.cast({name: numbers[name] for name in texts}), path):
        yield encoder.encode(frame)


def _number_types(encoder):
    """The columns that hold numbers, and polars' types of them."""
    if isinstance(encoder, FolderEncoder):
        dense, kinds = encoder.dense, {"integer": pl.Int64, "float": pl.Float64}
        types = {name: kinds.get(about["kind"]) for name, about in encoder.categorical.items()}
    else:
        dense, names = encoder.scales, encoder.vocabularies
        types = {name: pl.Series(names[name].values, strict=False).dtype for name in names}
    numeric = {name: kind for name, kind in types.items() if kind and kind.is_numeric()}
    return numeric | dict.fromkeys(dense, pl.Float64)


def _say_published(data):
    """Compare a file of the Kaggle contest's size with what was published of it."""
    sizes = [about["distinct"] for about in data.encoder.categorical.values()]
    found = [round(100 * np.mean(data.labels), 2), *sizes]
    published = [25.62, *CRITEO_KAGGLE_TABLE_SIZES]
    for name, ours, theirs in zip(["% of clicks", *CATEGORIES], found, published, strict=True):
        if ours != theirs:
            print(f"not as published: {name} has {ours:,}, published {theirs:,}")
    if found == published:
        print("as published: rows, clicks, names")


def main(arguments=None):
    """The commands `preprocess` and `predict`; an error is one line, and the exit code not 0."""
    parser = argparse.ArgumentParser(description="Tables and models for DLRM.ipynb")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preprocess", help="Criteo rows to the processed folder")
    command.add_argument("raw", metavar="RAW", nargs="+", help="text, .gz, .tar.gz, .csv, .parquet")
    command.add_argument("processed", metavar="PROCESSED")
    command.add_argument("--min-count", type=int, default=1, help="rarer categories become id 0")
    command.add_argument("--max-table-rows", type=int, help="at most this many rows a table")
    command = commands.add_parser("predict", help="score a file of rows with a saved model")
    for name in ("model", "rows", "out"):
        command.add_argument(name)
    o, start = parser.parse_args(arguments), time.perf_counter()
    try:
        if o.command == "predict":
            rows = predict_file(o.model, o.rows, o.out)
        else:
            data = preprocess_criteo(o.raw, o.processed, o.min_count, o.max_table_rows)
            rows = len(data)
            if rows == KAGGLE_ROWS:
                _say_published(data)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_utils.py {o.command}: {error}")
    seconds, status = time.perf_counter() - start, Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    memory = f", peak memory {int(peak[1]) / 1e6:.2f} GB" if peak else ""
    print(f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s{memory}")


if __name__ == "__main__":
    main()
