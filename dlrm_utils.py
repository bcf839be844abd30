"""The companion of DLRM.ipynb: it turns tables of ids and numbers into model input.

    python dlrm_utils.py preprocess data/toy.txt data/toy

Shapes: B rows in a batch, N rows in a file, nnz ids in a batch (all bags together).
"""

import argparse
import ast
import collections
import contextlib
import errno
import functools
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
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl
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
    bags = [bag if type(bag) is list else _listed(bag, b) for b, bag in enumerate(bags)]
    ids = list(itertools.chain.from_iterable(bags))
    if not _all_whole(ids):  # then each is looked at, which is slow
        ids = [_whole(i, b) for b, bag in enumerate(bags) for i in bag]
    indices = torch.from_numpy(np.array(ids, dtype=np.int64))
    return indices, lengths_to_offsets([len(bag) for bag in bags])


def _listed(bag, b):
    """A bag as a list, or ValueError."""
    if isinstance(bag, np.ndarray | torch.Tensor | pd.Series) and bag.ndim == 1:
        return bag.tolist()
    if not isinstance(bag, list | tuple | range):
        raise ValueError(f"bag {b} is {bag!r}, not a sequence of ids; one id is [id], none is []")
    return bag


def _all_whole(ids):
    """Are all ids plain integers that fit? One look at their types, minimum and maximum."""
    kinds = set(map(type, ids))
    return kinds <= {int, np.int64, np.int32} and (not ids or (min(ids) >= 0 and max(ids) < 2**63))


def _whole(i, b):
    """The id i of bag b as an int, or ValueError."""
    number = isinstance(i, int | float | np.integer | np.floating) and not isinstance(i, bool)
    if not number or not 0 <= i < 2**63 or i % 1:
        raise ValueError(f"bag {b} holds {i!r}; an id is a whole number, 0 or more (int64)")
    return int(i)


def to_bags(indices, offsets):
    """The inverse of `to_offsets`, a list of B lists; ValueError for offsets that cannot be."""
    indices = _int64_vector(indices, "indices")
    ends = _closed(offsets, len(indices)).tolist()
    return [indices[start:end].tolist() for start, end in itertools.pairwise(ends)]


def offsets_to_lengths(offsets, nnz):
    """Bag lengths (B,), as TorchRec counts, from offsets (B,) and the number of ids."""
    return _closed(offsets, nnz).diff()


def lengths_to_offsets(lengths):
    """Offsets (B,) from bag lengths (B,): offsets[b] is the number of ids before bag b."""
    lengths = _int64_vector(lengths, "lengths")
    if (lengths < 0).any():
        raise ValueError(f"lengths[{lengths.argmin()}] is {lengths.min()}; a bag has 0 or more ids")
    return lengths.cumsum(0) - lengths


def _closed(offsets, nnz):
    """Offsets with the closing offset nnz appended, (B + 1,), or ValueError."""
    closed = torch.cat([_int64_vector(offsets, "offsets"), torch.tensor([nnz])])
    if closed[0] != 0:
        raise ValueError(f"the offsets start at {closed[0]}; the first bag starts at 0")
    falls = (closed.diff() < 0).nonzero()
    if len(falls):
        b = falls[0].item()
        end = f"the next, or the end of the indices, is {closed[b + 1]}"
        raise ValueError(f"offsets[{b}] is {closed[b]}, but {end}; offsets never fall")
    return closed


def _int64_vector(values, name):
    """One row of integers as an int64 tensor, or ValueError."""
    vector = torch.as_tensor(values)
    wrong_type = vector.is_floating_point() or vector.dtype == torch.bool
    if vector.ndim != 1 or (wrong_type and len(vector)):
        raise ValueError(f"{name} must be one row of integers, not {vector.dtype}, {vector.shape}")
    return vector.long()


# ---- Batches -------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    dense: torch.Tensor  # (B, n_dense) float32
    indices: list  # one int64 tensor (nnz,) a table
    offsets: list  # one int64 tensor (B,) a table: where each row's bag starts
    labels: torch.Tensor = None  # (B,) float32, or None


class Batch(_Parts):
    """Model input for B rows: dense, indices, offsets, labels; ValueError if they disagree on B."""

    __slots__ = ()

    def __new__(cls, dense, indices, offsets, labels=None):
        if len(indices) != len(offsets):
            raise ValueError(f"{len(indices)} tables have ids, but {len(offsets)} have offsets")
        for t, starts in enumerate(offsets):
            if len(starts) != len(dense):
                raise ValueError(
                    f"table {t} has {len(starts)} bags, but there are {len(dense)} rows"
                )
        if labels is not None and len(labels) != len(dense):
            raise ValueError(f"there are {len(labels)} labels, but {len(dense)} rows")
        return super().__new__(cls, dense, indices, offsets, labels)

    def to(self, device):
        """The same batch on another device."""
        ids, starts = ([t.to(device) for t in part] for part in (self.indices, self.offsets))
        labels = None if self.labels is None else self.labels.to(device)
        return self._replace(
            dense=self.dense.to(device), indices=ids, offsets=starts, labels=labels
        )

    def take(self, rows):
        """The batch of some rows, in that order; `rows` are an index as NumPy reads it."""
        device, total = self.dense.device, len(self.dense)
        rows = torch.from_numpy(_row_numbers(rows, total)).to(device)
        following = (rows + 1).clamp(max=total - 1)
        indices, offsets = [], []
        for ids, starts in zip(self.indices, self.offsets, strict=True):
            ends = torch.where(rows + 1 < total, starts[following], len(ids))
            lengths = ends - starts[rows]
            new_starts = lengths_to_offsets(lengths)
            # Place k of the new bag b is place k of its old bag: shift each bag to its old start.
            shift = torch.repeat_interleave(starts[rows] - new_starts, lengths)
            indices.append(ids[shift + torch.arange(len(shift), device=device)])
            offsets.append(new_starts)
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.dense[rows], indices, offsets, labels)


def _row_numbers(rows, total):
    """Which of `total` rows an index means, int64 from 0 to total - 1; IndexError as in NumPy.

    rows: a range, a slice, one number, several (negative ones count from the end), or a mask.
    """
    if isinstance(rows, slice):
        rows = range(*rows.indices(total))
    if isinstance(rows, range):
        rows = np.arange(rows.start, rows.stop, rows.step)
    numbers = np.atleast_1d(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
    if numbers.dtype == bool:
        if numbers.shape != (total,):
            raise IndexError(f"a mask of shape {numbers.shape} cannot select from {total} rows")
        return np.flatnonzero(numbers)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise IndexError(f"rows are whole numbers or a mask, not {numbers.dtype}, {numbers.shape}")
    outside = (numbers < -total) | (numbers >= total)
    if outside.any():
        raise IndexError(f"there is no row {numbers[outside][0]}; there are {total}")
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + total, numbers)


def one_id_each(dense, ids, labels=None):
    """A `Batch` whose bags hold one id each, from dense (B, n_dense), ids (B,) a table, labels."""
    dense = torch.tensor(np.asarray(dense), dtype=torch.float32)
    indices = [_int64_vector(np.array(column), f"ids of table {t}") for t, column in enumerate(ids)]
    for t, column in enumerate(indices):
        if len(column) != len(dense):
            raise ValueError(f"table {t} has {len(column)} ids, but there are {len(dense)} rows")
    offsets = [torch.arange(len(dense))] * len(indices)
    labels = None if labels is None else torch.tensor(np.asarray(labels), dtype=torch.float32)
    return Batch(dense, indices, offsets, labels)


# ---- Work that takes long ------------------------------------------------------------------------


def progress(items, **options):
    """The items, under tqdm's bar where they take long; at the end it takes its own line away."""
    stream = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    return tqdm(items, **{"file": stream, "leave": False, "delay": 0.5} | options)


def _in_order(function, items, threads):
    """Yield function(item) for each item in order, computed in threads, a few items ahead."""
    pending = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _replacing(path):
    """Write to a temporary name beside path; whole and on the disk, it takes path's place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
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
    """A fingerprint of what JSON can hold; ValueError for anything else."""
    try:
        # NumPy's numbers are as Python's.
        text = json.dumps(content, default=np.generic.item, allow_nan=False, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"only texts and numbers can be saved ({error})") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_json(path, version, content):
    """Write a dict with its version and fingerprint; `_read_json` refuses any other file."""
    head = {"format": version, "fingerprint": _hash_of(content)}
    text = json.dumps(head | content, default=np.generic.item)
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read_json(path, version):
    """The dict that `_write_json` wrote, or ValueError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text at all
        content = None
    kind, found = (
        version.rsplit(" ", 1)[0],
        content.get("format") if isinstance(content, dict) else None,
    )
    if str(found).rsplit(" ", 1)[0] != kind:
        raise ValueError(f"{path} is not a whole file of the kind {kind}")
    if found != version:
        raise ValueError(f"{path} is of another version: {found}, not {version}")
    del content["format"]
    if content.pop("fingerprint", None) != _hash_of(content):
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
        if max_size is not None:
            kept = kept[: max_size - 1]  # id 0 has a row
        return cls(distinct[kept])

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
    """(codes, distinct): the distinct values by first sight, a missing one as None.

    codes (len(values),) are places in `distinct`, an array of objects.
    """
    if not isinstance(values, pd.Series | pd.Index | np.ndarray):
        values = pd.Series(list(values), dtype=object)
    codes, distinct = pd.factorize(values, use_na_sentinel=False)
    distinct = pd.Series(distinct).astype(object)
    return codes, distinct.where(distinct.notna(), None).to_numpy()


# ---- A DataFrame of one's own --------------------------------------------------------------------

FRAME_VERSION = "dlrm_utils.FrameEncoder 1"
KINDS = {  # what a category can be, by pandas' names of it
    "string": "text",
    **dict.fromkeys(["integer", "floating", "mixed-integer-float"], "number"),
    "boolean": "boolean",
    **dict.fromkeys(["datetime64", "datetime", "date"], "time"),
}


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
        if self.min_count < 1:
            raise ValueError(f"min_count is {min_count}; it must be 1 or more")
        self._numeric, self._tables = self.dense + self.counts, self.categorical + self.multi_hot
        for names in (self._numeric, self._tables):
            if len(set(names) | {self.label}) <= len(names):
                raise ValueError(f"a column is named twice among {[*names, self.label]}")
        self.scales = None  # mean and deviation of each dense column
        self.kinds, self.vocabularies = {}, {}  # of each table, by column

    def fit(self, frame):
        """Learn scales and vocabularies from the training rows alone. Returns self."""
        frame = self._frame(frame)
        if not len(frame):
            raise ValueError("there are no rows to fit")
        if self.label is not None:
            self._labels(frame)
        numbers = {column: _numbers(frame, column) for column in self._numeric}
        scales = {column: _scale(numbers[column]) for column in self.dense}
        kinds, vocabularies = {}, {}
        for column in self._tables:
            values, _ = self._bags(frame, column)
            values, kinds[column] = _of_one_kind(values)
            vocabularies[column] = Vocabulary.fit(values, self.min_count)
        # Only now, so that a fit that fails changes nothing.
        self.scales, self.kinds, self.vocabularies = scales, kinds, vocabularies
        return self

    @property
    def table_sizes(self):
        """Rows of each embedding table, in the order of `Batch.indices`."""
        self._require_fit()
        return [len(self.vocabularies[column]) for column in self._tables]

    def transform(self, frame):
        """A `Batch` with the frame's rows in order."""
        self._require_fit()
        frame = self._frame(frame)
        dense, indices, offsets = np.zeros((len(frame), len(self._numeric)), np.float32), [], []
        for k, column in enumerate(self._numeric):
            dense[:, k] = np.nan_to_num(self._scaled(column, _numbers(frame, column)))
        for column in self._tables:
            values, lengths = self._bags(frame, column)
            values, _ = _of_one_kind(values, self.kinds[column])
            indices.append(torch.from_numpy(self.vocabularies[column].encode(values)))
            offsets.append(lengths_to_offsets(lengths))
        labels = self._labels(frame) if self.label in frame else None
        return Batch(torch.from_numpy(dense), indices, offsets, labels)

    def _frame(self, rows):
        """What was given as a DataFrame of pandas or polars."""
        if isinstance(rows, pd.DataFrame | pl.DataFrame):
            return rows
        if not isinstance(rows, dict | pd.Series):
            found = type(rows).__name__
            raise ValueError(f"rows are a DataFrame of pandas or polars, or one dict, not {found}")
        row = dict(rows)
        single = [row.get(name) for name in [*self._numeric, *self.categorical, self.label]]
        many = any(pd.api.types.is_list_like(value) for value in single)
        return pd.DataFrame(row if many else [row])

    def _scaled(self, column, numbers):
        if column in self.counts:
            return np.log1p(np.maximum(numbers, 0))
        mean, deviation = self.scales[column]
        return (numbers - mean) / deviation

    def _bags(self, frame, column):
        """All values of a column, one after the other, and how many each row has."""
        values = _column(frame, column)
        if column in self.categorical:
            return values, np.ones(len(values), dtype=np.int64)
        missing = values.isna()
        bags = [[] if gone else bag for bag, gone in zip(values, missing, strict=True)]
        wrong = [not isinstance(bag, list | tuple | np.ndarray) for bag in bags]
        _refuse(values, wrong, "not a list of values")
        lengths = [len(bag) for bag in bags]
        flat = list(itertools.chain.from_iterable(bags))
        index = values.index.repeat(lengths)
        return pd.Series(flat, index, dtype=object, name=column).infer_objects(), lengths

    def _labels(self, frame):
        labels = _numbers(frame, self.label)
        _refuse(labels, ~labels.isin([0, 1]), "neither 0 nor 1")
        return torch.tensor(labels.to_numpy(), dtype=torch.float32)

    def _require_fit(self):
        if self.scales is None:
            raise ValueError("this FrameEncoder has seen no frame; call fit(frame) first")

    def _content(self):
        """All that transform needs, as JSON can hold it; times as texts."""
        names = ("dense", "counts", "categorical", "multi_hot", "label", "min_count")
        scales = [self.scales[column] for column in self.dense]
        kinds = [self.kinds[column] for column in self._tables]
        values = [self.vocabularies[column].values for column in self._tables]
        for k, kind in enumerate(kinds):
            if kind == "time":
                values[k] = [value and value.isoformat() for value in values[k]]
        learned = {"scales": scales, "kinds": kinds, "values": values}
        return {name: getattr(self, name) for name in names} | learned

    def fingerprint(self):
        """A text that another encoder shares only if it encodes alike."""
        self._require_fit()
        return _hash_of(self._content())

    def save(self, path):
        """Write all that transform needs as JSON."""
        self._require_fit()
        _write_json(path, FRAME_VERSION, self._content())

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; ValueError for any other file."""
        content = _read_json(path, FRAME_VERSION)
        learned = [content.pop(name) for name in ("scales", "kinds", "values")]
        encoder = cls(**content)
        encoder.scales = dict(zip(encoder.dense, learned[0], strict=True))
        for column, kind, values in zip(encoder._tables, *learned[1:], strict=True):
            if kind == "time":
                values = [value and pd.Timestamp(value) for value in values]
            encoder.kinds[column], encoder.vocabularies[column] = kind, Vocabulary(values)
        return encoder


def _names(names):
    """A list of column names, each a text or a whole number."""
    if isinstance(names, str):
        raise ValueError(f"{names!r} is one name; write [{names!r}]")
    return [name if isinstance(name, str) else operator.index(name) for name in names]


def _column(frame, name):
    """One column as a pandas Series."""
    if name not in frame.columns:
        raise ValueError(f"the frame has no column {name!r}; it has {list(frame.columns)}")
    if isinstance(frame, pl.DataFrame):
        return pd.Series(frame[name].to_list(), dtype=object, name=name).infer_objects()
    if frame.columns.tolist().count(name) > 1:
        raise ValueError(f"the frame has several columns {name!r}")
    return frame[name]


def _numbers(frame, name):
    """A column as float64, a missing value as NaN."""
    values = _column(frame, name)
    try:
        if pd.api.types.infer_dtype(values) in ("datetime64", "datetime", "date", "timedelta64"):
            raise TypeError("it holds times")
        numbers = values.to_numpy("float64", na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} is not numeric: {error}") from error
    _refuse(values, np.abs(numbers) > np.finfo(np.float32).max, "infinite, or too large")
    return pd.Series(numbers, values.index, name=name)


def _scale(numbers):
    """[mean, standard deviation], of a constant column [mean, 1]."""
    mean, variance = np.nan_to_num([numbers.mean(), numbers.var(ddof=0)]).tolist()
    rounding = len(numbers) * np.finfo(float).eps
    # What rounding leaves of a constant column's variance, by the rule of scikit-learn's scalers.
    constant = variance <= rounding * variance + (rounding * mean) ** 2
    return [mean, 1.0 if constant else math.sqrt(variance)]


def _of_one_kind(values, fitted=None):
    """(values, their kind): those of `KINDS`, all alike and as fitted, or ValueError."""
    present = values[values.notna().to_numpy()]
    if not len(present):
        return values, fitted
    kind = _kind(present)
    if kind is None or kind != (fitted or kind):
        kinds = [_kind([value]) for value in present]
        kind = fitted or kinds[0] or "text, a number, a boolean or a time"
        rule = "as in fit" if fitted else "as all of the column must be"
        _refuse(present, [other != kind for other in kinds], f"not a {kind}, {rule}")
    if kind == "number" and not pd.api.types.is_integer_dtype(present.dtype):
        _refuse(present, present.isin([np.inf, -np.inf]), "infinite")
    return (pd.to_datetime(values) if kind == "time" else values), kind


def _kind(values):
    inferred = pd.api.types.infer_dtype(values)
    if inferred in ("categorical", "unknown-array"):
        inferred = pd.api.types.infer_dtype(values.astype(object))
    return KINDS.get(inferred)


def _refuse(values, wrong, what):
    """ValueError for the first row of a column that the mask `wrong` marks, if there is one."""
    places = np.flatnonzero(wrong)
    if len(places):
        row, value = next(values.iloc[places[:1]].items())
        raise ValueError(f"column {values.name!r}, row {row!r}: {value!r} is {what}")


# ---- Criteo's columns ----------------------------------------------------------------------------

NUM_DENSE, NUM_TABLES = 13, 26
INTEGERS = [f"I{k + 1}" for k in range(NUM_DENSE)]
CATEGORIES = [f"C{k + 1}" for k in range(NUM_TABLES)]
MISSING = np.iinfo(np.int32).min  # how an empty integer field is marked
# Distinct values of the 26 categorical columns in Criteo's Kaggle file, as published.
# fmt: off
CRITEO_KAGGLE_TABLE_SIZES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
# fmt: on


# log(1 + max(x, 0)), a missing integer as 0.
def _log_counts(dense):
    return np.log1p(np.maximum(dense, 0).astype(np.float32))


# ---- Criteo: a folder of memory-mapped arrays ----------------------------------------------------

FORMAT = "dlrm_utils.criteo 2"
ARRAYS = {"labels": ("u1", ()), "dense": ("i4", (NUM_DENSE,)), "sparse": ("i4", (NUM_TABLES,))}
RUN, RUNS_AT_ONCE = 1024, 256  # neighbouring rows, and how many such runs are mixed


class CriteoFormatError(ValueError):
    """A raw line or a processed folder that is not what it should be; the message says where."""


class CriteoData:
    """Criteo rows on disk, in the raw file's order; nothing is read before it is asked for.

    labels (N,) uint8; dense (N, 13) int32 as read, `MISSING` where empty; sparse (N, 26) int32 ids.
    table_sizes: 26 ints. block_offsets: 8 ints, the bounds of 7 equal blocks of rows. train, test,
    validation: ranges of rows: blocks 1 to 6, the first and the second half of block 7.
    vocabularies: for each table the categories of ids 1, 2, ... as bytes, b"" the missing one.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.source = json.loads((self.path / "source.json").read_text(encoding="utf-8"))
        if self.source.pop("format") != FORMAT:
            raise ValueError("source.json names another format")
        kinds = [(self.path / f"{name}.npy", *kind) for name, kind in ARRAYS.items()]
        self.labels, self.dense, self.sparse = itertools.starmap(_mapped, kinds)
        if not len(self.labels) == len(self.dense) == len(self.sparse):
            raise ValueError("the arrays differ in length")
        files = [self.path / f"vocabularies/{column}.npy" for column in CATEGORIES]
        self.vocabularies = [_mapped(file, "S8") for file in files]
        self.table_sizes = [1 + len(categories) for categories in self.vocabularies]
        bounds = self.block_offsets = _block_offsets(len(self))
        middle = (bounds[6] + bounds[7] + 1) // 2
        self.train, self.test = range(bounds[6]), range(bounds[6], middle)
        self.validation = range(middle, bounds[7])
        self._read = set()  # runs of rows that were asked for of late

    def __len__(self):
        return len(self.labels)

    def batch(self, rows):
        """A `Batch` of rows (a range, a slice, numbers): log(1 + max(x, 0)), missing as 0."""
        if not isinstance(rows, slice):
            rows = np.array(rows, dtype=np.int64)
            self._read_ahead(set((rows % len(self) // RUN).tolist()) - self._read)
        return one_id_each(_log_counts(self.dense[rows]), self.sparse[rows].T, self.labels[rows])

    # Read whole runs of `shuffled_rows` once, so that the system holds their pages: the memory map
    # alone would fetch them page by page, which takes a cold disk over ten times as long.
    def _read_ahead(self, runs):
        self._read = runs if len(self._read) > 4 * RUNS_AT_ONCE else self._read | runs
        for array in (self.labels, self.dense, self.sparse) if runs else ():
            size = RUN * array.strides[0]
            with open(array.filename, "rb", buffering=0) as file:
                for run in sorted(runs):
                    file.seek(array.offset + run * size)
                    file.read(size)

    def encode(self, lines):
        """A `Batch` of raw Criteo lines (a list of texts, or one text), with or without label."""
        lines = lines.splitlines() if isinstance(lines, str) else lines
        labelled = any(line.count("\t") != len(COLUMNS) - 2 for line in lines)
        lines = [line.rstrip("\r\n") if labelled else "0\t" + line.rstrip("\r\n") for line in lines]
        frame = _parsed("".join(line + "\n" for line in lines).encode(), "lines", 1)
        names = frame.select(pl.col(CATEGORIES).fill_null("").str.to_lowercase())
        keys = [np.array(column.to_list(), "S8").view("u8") for column in names]
        # get_indexer says -1 where a name is unknown; its id is 0.
        ids = [index.get_indexer(k) + 1 for index, k in zip(self._indexes, keys, strict=True)]
        return one_id_each(_log_counts(_integers(frame)), ids, frame["label"] if labelled else None)

    @functools.cached_property
    def _indexes(self):
        return [pd.Index(categories.view("u8")) for categories in self.vocabularies]


def _mapped(path, dtype, row_shape=()):
    array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.ndim == 0 or array.shape[1:] != row_shape:
        raise ValueError(f"{path.name} holds {array.dtype} of shape {array.shape}")
    return array


# Bounds of the 7 blocks: equal, the first rows % 7 of them one row longer.
def _block_offsets(rows):
    size, longer = divmod(rows, 7)
    return [b * size + min(b, longer) for b in range(8)]


def shuffled_rows(rows, seed):
    """Row numbers in a random order that suits a file larger than memory, (len(rows),) int64."""
    # Runs of 1,024 neighbouring rows are put in random order; then the rows of each 256 runs, 41 MB
    # of the file, are mixed. Up to 262,144 rows this is any permutation.
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, len(rows), RUN))
    order = (starts[:, None] + np.arange(RUN)).ravel()
    order = order[order < len(rows)]  # the last run of the file may be shorter
    for start in range(0, len(order), RUN * RUNS_AT_ONCE):
        rng.shuffle(order[start : start + RUN * RUNS_AT_ONCE])
    return rows.start + rows.step * order if isinstance(rows, range) else np.asarray(rows)[order]


def shuffled_batches(get_batch, rows, batch_size, num_epochs=1, seed=0, start=0, stop=None):
    """Yield (step, done, get_batch(some rows)) for the steps start to stop of num_epochs."""
    # done is the share of the training before the step. The order of an epoch follows from seed and
    # its number alone, so a training can go on in the middle.
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    total = num_epochs * steps_per_epoch
    for step in progress(range(start, min(stop or total, total)), desc="training", unit="step"):
        epoch, place = divmod(step, steps_per_epoch)
        if step == start or place == 0:
            order = shuffled_rows(rows, [seed, epoch])
        yield step, step / total, get_batch(order[place * batch_size : (place + 1) * batch_size])


def load_criteo(processed_folder):
    """Open a processed folder, whatever its size, in milliseconds, or raise CriteoFormatError."""
    folder, advice = Path(processed_folder), "run python dlrm_utils.py preprocess RAW FOLDER"
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}; {advice}")
    try:
        return CriteoData(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        found = f"{folder} is not a whole processed Criteo folder ({error})"
        raise CriteoFormatError(f"{found}; name another, or delete it and {advice}") from error


# ---- Criteo: from raw text to the folder ---------------------------------------------------------
# Stage 1 writes what it reads as Arrow files; stage 2, a vocabulary and the ids of each column;
# stage 3, the three arrays. Files get their names when they are whole: a stopped run goes on there.

FIELDS = {"l": "[01]", "I": "(?:-?[0-9]{1,9})?", "C": "(?:[0-9a-fA-F]{8})?"}
WANTED = {"l": "a label, 0 or 1", "I": "a 32-bit integer", "C": "a category of 8 hex digits"}
TYPES = {"l": pl.UInt8, "I": pl.Int32, "C": pl.String}
COLUMNS = ["label", *INTEGERS, *CATEGORIES]
LINE = "^" + "\t".join(FIELDS[column[0]] for column in COLUMNS) + "$"
SCHEMA = {column: TYPES[column[0]] for column in COLUMNS}
PIECE = 1 << 24  # bytes of text parsed together


def preprocess_criteo(
    raw_data_file, processed_folder, min_count=1, max_table_rows=None, progress=True
):
    """Turn raw Criteo text into a folder of arrays and open it.

    raw_data_file: tab-separated label, 13 integers, 26 categories of 8 hex digits, empty where
    missing; plain, or packed as .gz, or as train.txt in a .tar.gz.
    processed_folder: opened if made before from the same rows and options, else refused.
    min_count, max_table_rows: categories seen less often in blocks 1 to 6, or beyond that many
    table rows, become id 0. A run that was stopped goes on from processed_folder + ".making".
    CriteoFormatError, naming file, line and column, for a malformed line; for under 7 rows.
    """
    raw, folder = Path(raw_data_file), Path(processed_folder)
    if not raw.is_file():
        raise FileNotFoundError(f"there is no raw file {raw}; data/README.md says where to get it")
    if min_count < 1 or (max_table_rows is not None and max_table_rows < 1):
        raise ValueError("min_count and max_table_rows must be 1 or more")
    source = dict(fingerprint=_fingerprint(raw), min_count=min_count, max_table_rows=max_table_rows)
    work = folder.with_name(f"{folder.name}.making")
    if work.exists() or not _in_use(folder):
        _make_alone(raw, folder, work, {"format": FORMAT} | source, progress)
    data = load_criteo(folder)
    if data.source != source:
        raise ValueError(f"{folder} was made from {data.source}, not {source}; delete or move it")
    return data


# The file's size and a hash of pieces spread evenly over it: an edited file differs.
def _fingerprint(path, samples=256, length=4096):
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for k in range(samples):
            file.seek(max(size - length, 0) * k // (samples - 1))
            digest.update(file.read(length))
    return f"{size} bytes {digest.hexdigest()[:16]}"


def _in_use(path):
    return path.is_file() or (path.exists() and any(path.iterdir()))


# Make the folder if no other process does. `work` then goes, unless we were stopped.
def _make_alone(raw, folder, work, about, show):
    if _in_use(work) and not (work / "lock").exists():
        raise CriteoFormatError(f"{work} is in the way; move it, or name another folder")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            try:
                if not _in_use(folder):  # another process may just have made it
                    stages = "-".join(map(str, about.values()))
                    _make(raw, folder, work / "stages" / stages, about, show)
            finally:
                if not isinstance(sys.exc_info()[1], KeyboardInterrupt | OSError):
                    shutil.rmtree(work / "stages", ignore_errors=True)
                    shutil.rmtree(
                        work, ignore_errors=True
                    )  # the lock goes last: it shows that the rest was ours
    except Timeout:
        raise RuntimeError(f"another process is making {folder}; wait for it") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            error.strerror = f"the disk is full; make room, run this again: {work} is kept"
        raise


def _make(raw, folder, stages, about, show):
    data = stages / "data"
    if not (stages / "parts").exists():
        _read_text(raw, stages / "unfinished", show)
        os.rename(stages / "unfinished", stages / "parts")
    parts = sorted((stages / "parts").iterdir())
    rows = _stored(parts, pl.len()).item() if parts else 0
    if rows < 7:
        raise CriteoFormatError(f"{raw} has {rows} rows; the seven blocks need at least one each")
    # Two at once: 46 million rows of a column take 1 GB.
    numbered = _in_order(lambda name: _number_column(stages, parts, about, name), CATEGORIES, 2)
    list(progress(numbered, desc="numbering categories", total=NUM_TABLES, disable=not show))
    _write_arrays(stages, parts, rows, show)
    with _replacing(data / "source.json") as temporary:
        temporary.write_text(json.dumps(about))
    _flush(data / "vocabularies")
    _flush(data)
    if folder.exists():
        folder.rmdir()  # an empty one
    os.rename(data, folder)
    _flush(folder.parent)


# Stage 1: check every line, and store all columns as numbers, a file for each piece.
def _read_text(raw, folder, show):
    folder.mkdir(parents=True, exist_ok=True)
    numbers = pl.col(CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32)

    def parse(piece):
        first_line, text = piece
        path = folder / f"{first_line:012}"
        _parsed(text, raw, first_line).with_columns(numbers).write_ipc(path)
        _flush(path)

    total = None if raw.suffix in (".gz", ".tgz") else math.ceil(raw.stat().st_size / PIECE)
    bar = {"unit": " MiB", "unit_scale": PIECE >> 20, "total": total, "disable": not show}
    with _unpacked(raw) as file:
        parsed = _in_order(parse, _pieces(file, raw), threads=3)
        list(progress(parsed, desc=f"reading {raw.name}", **bar))
    _flush(folder)


# The raw file, open; its bytes are those of the plain text.
@contextlib.contextmanager
def _unpacked(raw):
    try:
        if raw.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(raw, "r|gz") as archive:
                train = (member for member in archive if Path(member.name).name == "train.txt")
                yield archive.extractfile(next(train))
        else:
            with gzip.open(raw) if raw.suffix == ".gz" else open(raw, "rb") as file:
                yield file
    except (StopIteration, EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise CriteoFormatError(f"{raw} is damaged, or holds no train.txt: {error}") from error


# The text in pieces of whole lines: (number of the first line, bytes).
def _pieces(file, name):
    line = 1
    while text := file.read(PIECE):
        rest = file.readline(PIECE)
        if len(rest) == PIECE and not rest.endswith(b"\n"):
            line += text.count(b"\n")
            raise CriteoFormatError(f"{name}, line {line}, column 1: over {PIECE:,} bytes long")
        yield line, text + rest
        line += text.count(b"\n") + rest.count(b"\n")


# A DataFrame with the columns of SCHEMA from whole lines as bytes, or CriteoFormatError.
def _parsed(text, name, first_line):
    if text and not (text.isascii() and pl.read_lines(text)["line"].str.contains(LINE).all()):
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), first_line):
            line = line.removesuffix(b"\r").decode("ascii", "replace")
            _check_line(line, f"{name}, line {number}")
    options = {"separator": "\t", "has_header": False, "quote_char": None, "raise_if_empty": False}
    return pl.read_csv(text, schema=SCHEMA, **options)


# Name the first field that is not what it should be; slower than LINE, it knows more.
def _check_line(line, place):
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        found = f"{len(fields)} fields, not {len(COLUMNS)}"
        raise CriteoFormatError(f"{place}, column {min(len(fields), len(COLUMNS))}: {found}")
    for k, (column, field) in enumerate(zip(COLUMNS, fields, strict=True), start=1):
        kind = column[0]
        ten_digits = kind == "I" and re.fullmatch("-?[0-9]{10}", field)
        sound = abs(int(field)) < 2**31 if ten_digits else re.fullmatch(FIELDS[kind], field)
        if not sound:
            found = f"{field[:40]!r} is not {WANTED[kind]}"
            raise CriteoFormatError(f"{place}, column {k} ({column}): {found}")


def _stored(parts, columns):
    return pl.scan_ipc(parts, glob=False).select(columns).collect()


# Stage 2: one column's vocabulary, counted on blocks 1 to 6, and the ids of all rows.
def _number_column(stages, parts, about, name):
    vocabularies, done = stages / "data" / "vocabularies", stages / "ids" / f"{name}.npy"
    if done.exists():
        return
    numbers = pl.col(name).cast(pl.Int64).fill_null(-1)
    codes, firsts = pd.factorize(_stored(parts, numbers).to_series().to_numpy())  # by first sight
    counts = np.bincount(codes[: _block_offsets(len(codes))[6]], minlength=len(firsts))
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] >= about["min_count"]]
    order = order[: (about["max_table_rows"] or len(order) + 1) - 1]  # id 0 has a row, too
    kept = firsts[order]
    digits = np.frombuffer(kept.astype(">u4").tobytes().hex().encode(), "S8")
    ids = np.zeros(len(firsts), np.int32)
    ids[order] = np.arange(1, len(order) + 1)
    _save(vocabularies / f"{name}.npy", "S8", kept.shape, [np.where(kept < 0, b"", digits)])
    _save(done, "i4", codes.shape, [ids[codes]])


# Stage 3: labels, integers and ids, row by row.
def _write_arrays(stages, parts, rows, show, step=1 << 16):
    columns = [np.load(stages / "ids" / f"{name}.npy", mmap_mode="r") for name in CATEGORIES]
    cuts = [slice(start, start + step) for start in range(0, rows, step)]
    pieces = {
        "labels": (_stored([part], "label").to_series().to_numpy() for part in parts),
        "dense": (_integers(_stored([part], INTEGERS)) for part in parts),
        "sparse": (np.stack([column[cut] for column in columns], axis=1) for cut in cuts),
    }
    for name, (dtype, row_shape) in ARRAYS.items():
        path = stages / "data" / f"{name}.npy"
        if not path.exists():
            bar = progress(pieces[name], desc=f"writing {path.name}", disable=not show)
            _save(path, dtype, (rows, *row_shape), bar)


# The 13 integers, (n, 13) int32, `MISSING` where empty.
def _integers(frame):
    return frame.select(INTEGERS).fill_null(MISSING).to_numpy(order="c")


# Write a .npy file piece by piece.
def _save(path, dtype, shape, pieces):
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


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
    namespace, absent = {"__name__": path.name}, {"get_ipython"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        example = "example" in cell["metadata"].get("tags", [])
        body = _statements("".join(cell["source"])) if cell["cell_type"] == "code" else []
        for statement in body:
            if not (
                example or isinstance(statement, DEFINITIONS) or _is_constant(statement, namespace)
            ):
                continue
            code = compile(ast.Module([statement], []), path.name, "exec")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, namespace)
            except (ModuleNotFoundError, NameError) as error:
                if isinstance(error, NameError) and error.name not in absent:
                    raise
                if isinstance(error, ModuleNotFoundError) and not isinstance(statement, IMPORTS):
                    raise
                absent |= _defined(statement)
    return types.SimpleNamespace(**namespace)


def _statements(source):
    """The statements of a cell; lines such as %matplotlib become calls of get_ipython."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return ast.parse(TransformerManager().transform_cell(source)).body


def _is_constant(statement, namespace):
    """Is it NAME = something made of literals and earlier constants alone?"""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        return False
    nodes = list(ast.walk(statement))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    known = namespace.keys() | _defined(statement)
    called = any(isinstance(node, ast.Call) for node in nodes)
    return not called and names <= known and all(name.isupper() for name in names)


def _defined(statement):
    """The names that a statement would define."""
    if isinstance(statement, IMPORTS):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    nodes = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {node.id for node in nodes if isinstance(node.ctx, ast.Store)}


# ---- Saved models --------------------------------------------------------------------------------

MODEL_VERSION = "dlrm_utils.save_model 1"
MODEL_FILES = {"settings.json", "weights.pt", "encoder.json", "encoder"}


def save_model(folder, model_settings, model, encoder):
    """Write a folder that `load_model` opens anywhere; it takes the place of an older one.

    model_settings: the class's name in the notebook and its arguments without table_sizes, as
    {"class": "DLRM", "embedding_dim": 16, "bottom_mlp": [64], "top_mlp": [64], "num_dense": 13}.
    encoder: a fitted `FrameEncoder`, or the `CriteoData` that the model was trained on.
    """
    folder, encoder = Path(folder), getattr(encoder, "encoder", encoder)
    work, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    fingerprint, weights = encoder.fingerprint(), model.state_dict()
    if type(model).__name__ != model_settings["class"]:
        raise ValueError(f"the model is a {type(model).__name__}, not {model_settings['class']}")
    _fitting(model_settings, encoder, weights, "meta")
    _refuse_foreign(folder)
    for leftover in (work, old):
        _remove_model(leftover)
    work.mkdir(parents=True)
    try:
        encoder.save(work / ("encoder.json" if isinstance(encoder, FrameEncoder) else "encoder"))
        torch.save({"encoder": fingerprint, "weights": weights}, work / "weights.pt")
        written = [path for path in work.rglob("*") if path.is_file()]
        sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in written}
        settings = {"model": model_settings, "encoder": fingerprint, "sizes": sizes}
        _write_json(work / "settings.json", MODEL_VERSION, settings)
        for path in [*work.rglob("*"), work]:
            _flush(path)
    except BaseException:
        _remove_model(work)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(work, folder)
    _flush(folder.parent)
    _remove_model(old)


def load_model(folder):
    """Open what `save_model` wrote: (model, encoder), the model on the CPU and in `eval` mode.

    FileNotFoundError where there is no folder; ValueError if it is cut, foreign, of another
    version, or of parts that do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder} is no folder of save_model: it has no settings.json")
    settings = _read_json(folder / "settings.json", MODEL_VERSION)
    for name, size in settings["sizes"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{folder} is damaged: {name} is cut, exchanged or absent")
    if "encoder.json" in settings["sizes"]:
        encoder = FrameEncoder.load(folder / "encoder.json")
    else:
        encoder = FolderEncoder.load(folder / "encoder")
    saved = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    if not settings["encoder"] == saved["encoder"] == encoder.fingerprint():
        raise ValueError(f"{folder} has the weights of one model and the vocabularies of another")
    with torch.random.fork_rng(devices=[]):  # what is drawn here does not move the caller's seed
        model = _fitting(settings["model"], encoder, saved["weights"], "cpu")
    model.load_state_dict(saved["weights"])
    return model.eval(), encoder


def _fitting(settings, encoder, weights, device):
    """A new model of these settings, or ValueError if the weights are not of its shapes."""
    arguments = {name: value for name, value in settings.items() if name != "class"}
    kind = getattr(load_notebook(), settings["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ValueError(f"the notebook has no model named {settings['class']}")
    try:
        with torch.device(device):
            model = kind(table_sizes=encoder.table_sizes, **arguments)
    except TypeError as error:
        raise ValueError(f"no {settings['class']} has the settings {arguments}: {error}") from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    different = [name for name in expected | given if expected.get(name) != given.get(name)]
    if different:
        raise ValueError(f"settings and encoder make another model: {different[0]} differs")
    return model


def _refuse_foreign(folder):
    """ValueError if a path holds anything but what `save_model` writes."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name another folder")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names - MODEL_FILES or (names and "settings.json" not in names):
        raise ValueError(f"{folder} holds what save_model did not write; name another folder")
    if names:
        _read_json(folder / "settings.json", MODEL_VERSION)


def _remove_model(folder):
    """Remove the files that `save_model` writes, by name, and then the empty folder."""
    for name in MODEL_FILES if folder.exists() else ():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()


# ---- Commands ------------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Criteo files for DLRM.ipynb")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preprocess", help="raw Criteo text to the processed folder")
    command.add_argument("raw", metavar="RAW")
    command.add_argument("processed", metavar="PROCESSED")
    command.add_argument("--min-count", type=int, default=1, help="rarer categories become id 0")
    command.add_argument("--max-table-rows", type=int, help="at most this many rows a table")
    o, start = parser.parse_args(arguments), time.perf_counter()
    try:
        rows = len(preprocess_criteo(o.raw, o.processed, o.min_count, o.max_table_rows))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_utils.py {o.command}: {error}")
    seconds, status = time.perf_counter() - start, Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    memory = f", peak memory {int(peak[1]) / 1e6:.2f} GB" if peak else ""
    print(f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s{memory}")


if __name__ == "__main__":
    main()
