"""The companion of DLRM.ipynb: it turns tables of ids and numbers into model input.

    python dlrm_utils.py toy data/toy.txt --rows 200000
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
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import types
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import polars as pl
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

# A model without dense numbers has layers without inputs; PyTorch warns of each, needlessly.
warnings.filterwarnings("ignore", message="Initializing zero-element tensors")

# ---- Sparse-offset converters --------------------------------------------------------------------
# EmbeddingBag's convention: bag b is indices[offsets[b]:offsets[b + 1]]; the last runs to the end.


def to_offsets(bags):
    """Lay ragged bags of ids flat: (indices, offsets), int64 tensors of shape (nnz,) and (B,).

    bags: a sequence of sequences of ints, an array of equal rows, or a pandas Series of lists.
    Raises ValueError, naming the bag, for an id that is no whole number from 0 to 2**63 - 1.
    """
    bags = [_checked_bag(bag, b) for b, bag in enumerate(bags)]
    indices = torch.tensor(list(itertools.chain.from_iterable(bags)), dtype=torch.int64)
    return indices, lengths_to_offsets([len(bag) for bag in bags])


def _checked_bag(bag, b):
    if isinstance(bag, np.ndarray | torch.Tensor | pd.Series) and bag.ndim == 1:
        bag = bag.tolist()
    if not isinstance(bag, list | tuple | range):
        raise ValueError(f"bag {b} is {bag!r}, not a sequence of ids; one id is [id], none is []")
    for i in bag:
        number = isinstance(i, int | float | np.integer | np.floating) and not isinstance(i, bool)
        if not number or not 0 <= i < 2**63 or i % 1:
            raise ValueError(f"bag {b} holds {i!r}; an id is a whole number, 0 or more (int64)")
    return [int(i) for i in bag]


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
        b = lengths.argmin()
        raise ValueError(f"lengths[{b}] is {lengths[b]}; a bag holds 0 or more ids")
    return lengths.cumsum(0) - lengths


def _closed(offsets, nnz):
    """Offsets with the closing offset nnz appended, (B + 1,), or ValueError."""
    closed = torch.cat([_int64_vector(offsets, "offsets"), torch.tensor([nnz])])
    if closed[0] != 0:
        raise ValueError(f"the offsets start at {closed[0]}; the first bag starts at 0")
    falls = (closed.diff() < 0).nonzero()
    if len(falls):
        b = falls[0].item()
        after = f"the next, or the end of the indices, is {closed[b + 1]}"
        raise ValueError(f"offsets[{b}] is {closed[b]}, but {after}; offsets never fall")
    return closed


def _int64_vector(values, name):
    vector = torch.as_tensor(values)
    wrong_type = vector.is_floating_point() or vector.dtype == torch.bool
    if vector.ndim != 1 or (wrong_type and len(vector)):
        found = f"{vector.dtype} of shape {tuple(vector.shape)}"
        raise ValueError(f"{name} must be one row of integers, not {found}")
    return vector.long()


# ---- Batches -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Model input for B rows; every categorical column is a table with indices and offsets."""

    dense: torch.Tensor  # (B, n_dense) float32
    indices: list  # one int64 tensor (nnz,) a table
    offsets: list  # one int64 tensor (B,) a table: where each row's bag starts
    labels: torch.Tensor = None  # (B,) float32, or None

    def to(self, device):
        """The same batch on another device."""
        indices = [ids.to(device) for ids in self.indices]
        offsets = [starts.to(device) for starts in self.offsets]
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.dense.to(device), indices, offsets, labels)

    def take(self, rows):
        """The batch of the rows numbered by a range, an array or a tensor, in that order."""
        rows = torch.as_tensor(np.asarray(rows), dtype=torch.int64)
        indices, offsets = [], []
        for ids, starts in zip(self.indices, self.offsets, strict=True):
            lengths = offsets_to_lengths(starts, len(ids))[rows]
            new_starts = lengths_to_offsets(lengths)
            # Place k of the new bag b is place k of its old bag: shift each bag to its old start.
            shift = torch.repeat_interleave(starts[rows] - new_starts, lengths)
            indices.append(ids[shift + torch.arange(len(shift))])
            offsets.append(new_starts)
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.dense[rows], indices, offsets, labels)


def one_id_each(dense, ids, labels=None):
    """A `Batch` of dense (B, n_dense) and labels (B,) whose bags hold one id each.

    ids: for each table an array or a list (B,). Then bag b starts at place b.
    """
    indices = [torch.from_numpy(np.array(column, dtype=np.int64)) for column in ids]
    offsets = [torch.arange(len(dense))] * len(indices)
    if labels is not None:
        labels = torch.from_numpy(np.array(labels, dtype=np.float32))
    return Batch(torch.from_numpy(np.array(dense, dtype=np.float32)), indices, offsets, labels)


def to_keyed_jagged(batch):
    """The ids of a `Batch` as TorchRec's KeyedJaggedTensor, with keys t0, t1, ..."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # only who uses TorchRec needs it

    bags = zip(batch.indices, batch.offsets, strict=True)
    lengths = torch.cat([offsets_to_lengths(starts, len(ids)) for ids, starts in bags])
    keys = [f"t{t}" for t in range(len(batch.indices))]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(batch.indices), lengths=lengths)


def progress(items, size=None, **options):
    """Yield the items under a progress bar that leaves nothing behind, in a terminal or a notebook.

    size(item) is what the bar counts (else items). options go to tqdm: desc, unit, total, disable.
    """
    in_notebook = "ipykernel" in sys.modules
    if size is None and hasattr(items, "__len__"):
        options.setdefault("total", len(items))
    file = sys.stdout if in_notebook else sys.stderr
    with tqdm(file=file, leave=False, delay=0.5, unit_scale=True, **options) as bar:
        for item in items:
            yield item
            bar.update(1 if size is None else size(item))
    if in_notebook:
        from IPython.display import clear_output

        clear_output()


def _in_order(function, items, threads):
    """Yield function(item) for each item in order, computed in threads, a few items ahead."""
    pending = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # after an error, or when nobody asks for more
            pool.shutdown(wait=False, cancel_futures=True)


def prefetched(items):
    """The same items in order, each made in a second thread while those before it are in use."""
    items, end = iter(items), object()
    made = _in_order(lambda _: next(items, end), itertools.repeat(None), threads=1)
    return itertools.takewhile(lambda item: item is not end, made)


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
        os.fsync(descriptor)
        os.close(descriptor)


# ---- Vocabulary ----------------------------------------------------------------------------------


class Vocabulary:
    """Which value has which row of an embedding table.

    Id 0 is kept for values never seen in `fit`; the more frequent a value, the smaller its id, ties
    by first sight. A missing value (None, NaN, NaT, pd.NA) is a value of its own: None.
    """

    UNKNOWN = "<unknown>"

    def __init__(self, values):
        """values: what ids 1, 2, 3, ... stand for, without repeats, None for the missing value."""
        self.values = list(values)
        self._ids = {value: i for i, value in enumerate(self.values, start=1)}

    @classmethod
    def fit(cls, values, min_count=1, max_size=None):
        """Number the values seen min_count times or more, in at most max_size table rows."""
        codes, firsts = _factorized(values)
        return cls([firsts[k] for k in _most_frequent(codes, len(firsts), min_count, max_size)])

    def __len__(self):
        return len(self.values) + 1

    def encode(self, values):
        """Ids of values, int64 of shape (len(values),); 0 where a value is unknown."""
        codes, firsts = _factorized(values)
        return np.array([self._ids.get(value, 0) for value in firsts], dtype=np.int64)[codes]

    def decode(self, ids):
        """The values of ids: a list; None for the missing value, `Vocabulary.UNKNOWN` for id 0."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(f"this vocabulary has ids 0 to {len(self) - 1}, not all of {ids}")
        return [self.UNKNOWN if i == 0 else self.values[i - 1] for i in ids.tolist()]


def _factorized(values):
    """For each value the number of its first sight, (n,), and the distinct values in that order."""
    if not isinstance(values, pd.Series | np.ndarray):
        values = pd.Series(list(values), dtype=object)
    codes, firsts = pd.factorize(pd.Series(values), use_na_sentinel=False)
    return codes, [None if pd.isna(value) else value for value in np.asarray(firsts, dtype=object)]


def _most_frequent(codes, size, min_count, max_rows):
    """Which codes, numbers below size, get ids 1, 2, ...: by falling count, then by code."""
    counts = np.bincount(codes, minlength=size)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] >= min_count]
    return order if max_rows is None else order[: max(max_rows - 1, 0)]  # id 0 takes a row, too


# ---- A DataFrame of one's own --------------------------------------------------------------------


class FrameEncoder:
    """Turns a DataFrame into a `Batch`; a column that does not fit is named in a ValueError.

    dense: numeric columns, scaled to mean 0 and standard deviation 1 in `fit`; missing as 0.
    categorical: one value a row. multi_hot: a list of values a row, a missing one an empty bag.
    Both, in this order, are tables; values seen less than min_count times become id 0.
    label: a column of 0 and 1, put into `Batch.labels` where the frame has it.
    """

    def __init__(self, dense=(), categorical=(), multi_hot=(), label=None, min_count=1):
        self.dense, self.categorical = list(dense), list(categorical)
        self.multi_hot, self.label, self.min_count = list(multi_hot), label, min_count
        self.scales, self.vocabularies = None, {}  # scales: column to mean and standard deviation

    def fit(self, frame):
        """Learn scales and vocabularies from the training rows alone. Returns self."""
        self.scales = {}
        for column in self.dense:
            numbers = _numbers(frame, column)
            mean, std = numbers.mean(), numbers.std(ddof=0)
            self.scales[column] = [mean, std] if std > 0 else [np.nan_to_num(mean), 1.0]
        for column in self.categorical + self.multi_hot:
            values, _ = self._bags(frame, column)
            self.vocabularies[column] = Vocabulary.fit(values, self.min_count)
        return self

    @property
    def table_sizes(self):
        """Rows of each embedding table, in the order of `Batch.indices`."""
        self._require_fit()
        return [len(vocabulary) for vocabulary in self.vocabularies.values()]

    def transform(self, frame):
        """A `Batch` with the frame's rows in order."""
        self._require_fit()
        dense, indices, offsets = np.zeros((len(frame), len(self.dense)), np.float32), [], []
        for k, (column, (mean, std)) in enumerate(self.scales.items()):
            dense[:, k] = ((_numbers(frame, column) - mean) / std).fillna(0)
        for column, vocabulary in self.vocabularies.items():
            values, lengths = self._bags(frame, column)
            indices.append(torch.from_numpy(vocabulary.encode(values)))
            offsets.append(lengths_to_offsets(lengths))
        return Batch(torch.from_numpy(dense), indices, offsets, self._labels(frame))

    def _bags(self, frame, column):
        """All values of a column, one after the other, and how many each row has."""
        values = _column(frame, column)
        if column in self.categorical:
            return values, np.ones(len(values), dtype=np.int64)
        lists = [_list_of(value, column, row) for row, value in values.items()]
        return list(itertools.chain.from_iterable(lists)), [len(bag) for bag in lists]

    def _labels(self, frame):
        if self.label not in frame:
            return None
        labels = _numbers(frame, self.label)
        _refuse(frame[self.label][~labels.isin([0, 1])], "neither 0 nor 1")
        return torch.tensor(labels.to_numpy(), dtype=torch.float32)

    def _require_fit(self):
        if self.scales is None:
            raise ValueError("this FrameEncoder has seen no frame; call fit(frame) first")

    def save(self, path):
        """Write all that transform needs as JSON; ValueError for values that JSON cannot hold."""
        self._require_fit()
        values = {column: vocabulary.values for column, vocabulary in self.vocabularies.items()}
        content = vars(self) | {"vocabularies": values}
        try:
            text = json.dumps(content, default=np.generic.item)  # NumPy's numbers as Python's
        except TypeError as error:
            raise ValueError(f"only texts and numbers can be saved ({error})") from error
        with _replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        encoder, content = cls(), Path(path).read_text(encoding="utf-8")
        try:
            content = json.loads(content)
            vars(encoder).update({name: content[name] for name in vars(encoder)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file that FrameEncoder.save wrote") from error
        for column, values in content["vocabularies"].items():
            encoder.vocabularies[column] = Vocabulary(values)
        return encoder


def _column(frame, column):
    if column not in frame:
        raise ValueError(f"the frame has no column {column!r}; it has {list(frame.columns)}")
    return frame[column]


def _numbers(frame, column):
    try:
        numbers = pd.to_numeric(_column(frame, column).astype(object)).astype("float64")
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {column!r} is not numeric: {error}") from error
    _refuse(numbers[np.isinf(numbers)], "an infinite number")
    return numbers


def _refuse(values, what):
    for row, value in values.items():
        raise ValueError(f"column {values.name!r}, row {row!r}: {value!r} is {what}")


def _list_of(value, column, row):
    if isinstance(value, list | tuple | np.ndarray):
        return value
    if pd.isna(value):
        return []
    raise ValueError(f"multi-hot column {column!r}, row {row!r}: {value!r} is not a list of values")


# ---- Toy clicks with a planted truth -------------------------------------------------------------

NUM_DENSE, NUM_TABLES = 13, 26
INTEGERS = [f"I{k + 1}" for k in range(NUM_DENSE)]
CATEGORIES = [f"C{k + 1}" for k in range(NUM_TABLES)]
MISSING = np.iinfo(np.int32).min  # how an empty integer field is marked
# Distinct values of the 26 categorical columns in Criteo's Kaggle file, as published.
# fmt: off
CRITEO_KAGGLE_TABLE_SIZES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
]
# fmt: on


class ToyTruth:
    """The rule behind the toy clicks: what the data would tell a perfect reader.

        logit = bias + dense weights · z + sum of category effects
                + sum over pairs (j, k) of interacting fields of sign[j, k] · <vector_j, vector_k>

    where z is log(1 + max(x, 0)) of each integer, standardised. Field 0 of the interacting ones is
    the dense part, the others are five categorical columns. A category is known by its rank, 0 the
    most frequent of its column; effects and vectors shrink with 1 / (1 + rank / 10): a quiet tail.
    """

    PROTOTYPES, DIM, INTERACTING, HEAD, BASE_RATE = 1024, 2, 5, 10, 0.256

    def __init__(self, seed=0, signal=True):
        rng = np.random.default_rng([seed, 0])
        self.signal = signal
        self.log_mean = rng.uniform(0.5, 3.0, NUM_DENSE)
        self.log_std = rng.uniform(0.8, 1.6, NUM_DENSE)
        shares = [0, 0, 0.01, 0.04, 0.04, 0.05, 0.2, 0.2, 0.22, 0.22, 0.45, 0.45, 0.75]
        self.dense_missing = rng.permutation(shares)
        shares = [0] * 15 + [0.03] * 5 + [0.12, 0.35, 0.44, 0.44, 0.5, 0.76]
        self.sparse_missing = rng.permutation(shares)
        self.dense_weights = rng.normal(0, 0.25, NUM_DENSE)
        self.dense_projection = rng.normal(0, NUM_DENSE**-0.5, (NUM_DENSE, self.DIM))
        self.effects = rng.normal(0, 0.35, (NUM_TABLES, self.PROTOTYPES))
        self.vectors = rng.normal(0, 0.8, (NUM_TABLES, self.PROTOTYPES, self.DIM))
        sizes = np.array(CRITEO_KAGGLE_TABLE_SIZES)
        middling = np.flatnonzero((sizes >= 10) & (sizes <= 6000) & (self.sparse_missing < 0.2))
        self.fields = np.sort(rng.permutation(middling)[: self.INTERACTING])
        signs = np.triu(rng.choice([-1.0, 1.0], (self.INTERACTING + 1,) * 2), 1)
        self.signs = signs + signs.T  # (6, 6), zero diagonal
        self.bias = 0.0
        self.bias = self._bias_for_base_rate(*self.draw(np.random.default_rng([seed, 1]), 100_000))

    def draw(self, rng, rows):
        """Integers (rows, 13) int32 and category ranks (rows, 26) int64, -1 missing."""
        counts = np.expm1(rng.normal(self.log_mean, self.log_std, (rows, NUM_DENSE)))
        dense = np.clip(counts, -1, 2**31 - 1).astype(np.int32)
        dense[:, 1] -= 2  # Criteo's I2 goes below zero, too
        dense[rng.random(dense.shape) < self.dense_missing] = MISSING
        ranks = [_long_tail(rng, size, rows) for size in CRITEO_KAGGLE_TABLE_SIZES]
        ranks = np.stack(ranks, axis=1)
        ranks[rng.random(ranks.shape) < self.sparse_missing] = -1
        return dense, ranks

    def logit(self, dense, ranks):
        """True log-odds of a click, (rows,)."""
        z = np.where(dense == MISSING, 0, (_log_counts(dense) - self.log_mean) / self.log_std)
        z = np.clip(z, -3, 3)
        vectors = [z @ self.dense_projection] + [self.vector(j, ranks[:, j]) for j in self.fields]
        vectors = np.stack(vectors, axis=1)  # (rows, 6, 2)
        others = np.einsum("jk,bkd->bjd", self.signs, vectors)
        pairs = np.einsum("bjd,bjd->b", vectors, others) / 2
        effects = sum(self.effect(j, ranks[:, j]) for j in range(NUM_TABLES))
        return self.bias + self.signal * (z @ self.dense_weights + effects + pairs)

    def effect(self, field, ranks):
        """What each category of a field adds to the log-odds, (len(ranks),)."""
        return self.effects[field, ranks % self.PROTOTYPES] * self._loudness(ranks)

    def vector(self, field, ranks):
        """The hidden vector of each category of a field, (len(ranks), 2)."""
        return self.vectors[field, ranks % self.PROTOTYPES] * self._loudness(ranks)[:, None]

    @staticmethod
    def code(field, ranks):
        """The 32-bit number of a category in the file; no two ranks of a field share one."""
        mixed = (ranks.astype(np.uint64) + 1) * 2654435761 + int(field) * 2246822507
        return (mixed & 0xFFFFFFFF).astype(np.int64)

    def _loudness(self, ranks):
        return 1 / (1 + np.maximum(ranks, 0) / self.HEAD)

    def _bias_for_base_rate(self, dense, ranks):
        logits, low, high = self.logit(dense, ranks), -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            too_many = _sigmoid(logits + middle).mean() > self.BASE_RATE
            low, high = (low, middle) if too_many else (middle, high)
        return middle


def _long_tail(rng, size, rows, exponent=1.2):
    """Ranks 0 to size - 1 with probability falling as (rank + 1) ** -exponent, (rows,) int64."""
    power = 1 - exponent
    uniform = rng.random(rows)
    return ((((size + 1) ** power - 1) * uniform + 1) ** (1 / power)).astype(np.int64) - 1


def _log_counts(dense):
    """log(1 + max(x, 0)), a missing integer as 0."""
    return np.log1p(np.maximum(dense, 0).astype(np.float32))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def write_toy_criteo(path, rows, seed=0, signal=True):
    """Write toy clicks in Criteo's raw format; the true click probabilities, (rows,) float64.

    The same seed writes the same rows, and a longer file starts with the shorter one.
    signal=False plants nothing: all rows have the base rate.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a file has at least one row")
    lines = functools.partial(_toy_lines, ToyTruth(seed, signal), seed, rows)
    chunks = _in_order(lines, range(0, rows, TOY_CHUNK), threads=os.cpu_count())
    bar, probabilities = {"desc": "writing toy clicks", "unit": "row", "total": rows}, []
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        for text, probability in progress(chunks, lambda chunk: len(chunk[1]), **bar):
            file.write(text)
            probabilities.append(probability)
    return np.concatenate(probabilities)


TOY_CHUNK = 20_000  # rows drawn together: another number would give other rows
FOUR_HEX_DIGITS = pl.Series([f"{number:04x}" for number in range(1 << 16)])


def _toy_lines(truth, seed, rows, start):
    """The text of at most TOY_CHUNK rows from start on, as bytes, and their click probabilities."""
    rng, kept = np.random.default_rng([seed, 2, start // TOY_CHUNK]), min(TOY_CHUNK, rows - start)
    dense, ranks = truth.draw(rng, TOY_CHUNK)
    probability = _sigmoid(truth.logit(dense, ranks))
    columns = {"label": (rng.random(TOY_CHUNK) < probability).astype(np.uint8)}
    columns |= zip(INTEGERS, dense.T, strict=True)
    for j, name in enumerate(CATEGORIES):
        high, low = divmod(truth.code(j, ranks[:, j]), 1 << 16)
        digits = FOUR_HEX_DIGITS.gather(high) + FOUR_HEX_DIGITS.gather(low)
        columns[name] = digits.set(pl.Series(ranks[:, j] < 0), None)
    frame = pl.DataFrame(columns)[:kept].with_columns(pl.col(INTEGERS).replace(MISSING, None))
    return frame.write_csv(include_header=False, separator="\t").encode(), probability[:kept]


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
    vocabularies: one `CriteoVocabulary` a table. source: the raw file's fingerprint, the options.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.source = json.loads((self.path / "source.json").read_text(encoding="utf-8"))
        if self.source.pop("format") != FORMAT:
            raise ValueError("source.json names another format")
        arrays = [_mapped(self.path / f"{name}.npy", *kind) for name, kind in ARRAYS.items()]
        if len({len(array) for array in arrays}) > 1:
            raise ValueError("the arrays differ in length")
        self.labels, self.dense, self.sparse = arrays
        self.vocabularies = [CriteoVocabulary(self.path / "vocabularies", c) for c in CATEGORIES]
        self.table_sizes = [len(vocabulary) for vocabulary in self.vocabularies]
        self.block_offsets = _block_offsets(len(self))
        start, end = self.block_offsets[6:]
        middle = (start + end + 1) // 2
        self.train, self.test = range(start), range(start, middle)
        self.validation = range(middle, end)
        self._read = set()  # runs of rows read ahead of late

    def __len__(self):
        return len(self.labels)

    def batch(self, rows):
        """A `Batch` of rows (a range, a slice, numbers): log(1 + max(x, 0)), missing as 0."""
        if isinstance(rows, range) and rows and rows.step > 0:  # a piece of the file, read as such
            rows = slice(rows.start, rows.stop, rows.step)
        if not isinstance(rows, slice):
            rows = np.array(rows, dtype=np.int64)
            self._read_ahead(rows)
        ids = self.sparse[rows].T  # (26, B)
        return one_id_each(_log_counts(self.dense[rows]), ids, self.labels[rows])

    def _read_ahead(self, rows):
        """Read whole, once, the runs of `shuffled_rows` of which a batch holds two rows or more.

        The memory map alone would fetch a run page by page, which takes a cold disk over ten times
        as long. What matters is that the system then holds these pages.
        """
        runs, counts = np.unique(rows // RUN, return_counts=True)
        wanted = set(runs[counts > 1].tolist()) - self._read
        self._read = wanted if len(self._read) > 4 * RUNS_AT_ONCE else self._read | wanted
        for array in (self.labels, self.dense, self.sparse) if wanted else ():
            size = RUN * array.strides[0]
            with open(array.filename, "rb", buffering=0) as file:
                for run in sorted(wanted):
                    file.seek(array.offset + run * size)
                    file.read(size)

    def encode(self, lines):
        """A `Batch` of raw Criteo lines (a list of texts, or one text), with or without label."""
        lines = lines.removesuffix("\n").split("\n") if isinstance(lines, str) else lines
        labelled = any(line.count("\t") != len(COLUMNS) - 2 for line in lines)
        text = "".join(
            ("" if labelled else "0\t") + line.removesuffix("\n") + "\n" for line in lines
        )
        frame = _parsed(text.encode(), "lines", 1)
        columns = zip(self.vocabularies, frame[CATEGORIES], strict=True)
        ids = [vocabulary.encode(texts) for vocabulary, texts in columns]
        labels = frame["label"].to_numpy() if labelled else None
        return one_id_each(_log_counts(_integers(frame)), ids, labels)


def _mapped(path, dtype, row_shape=()):
    array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.ndim == 0 or array.shape[1:] != row_shape:
        raise ValueError(f"{path.name} holds {array.dtype} of shape {array.shape}")
    return array


def _block_offsets(rows):
    """Bounds of the 7 blocks: equal, the first rows % 7 of them one row longer."""
    size, longer = divmod(rows, 7)
    return [b * size + min(b, longer) for b in range(8)]


def shuffled_rows(rows, seed):
    """Row numbers in a random order that suits a file larger than memory, (len(rows),) int64.

    Runs of 1,024 neighbouring rows are put in random order; then the rows of each 256 runs, 262,144
    rows, are mixed. While those are used, only their pages (41 MB of a Criteo folder) have to be in
    memory, and the disk reads long pieces. Up to 262,144 rows this is a plain permutation.
    """
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, len(rows), RUN))
    order = (starts[:, None] + np.arange(RUN)).ravel()
    order = order[order < len(rows)]  # the last run of the file may be shorter
    for start in range(0, len(order), RUN * RUNS_AT_ONCE):
        rng.shuffle(order[start : start + RUN * RUNS_AT_ONCE])
    return rows.start + rows.step * order if isinstance(rows, range) else np.asarray(rows)[order]


def shuffled_batches(get_batch, rows, batch_size, num_epochs=1, seed=0, start=0, stop=None):
    """Yield (step, done, batch) for the steps start to stop of a training of num_epochs.

    get_batch(numbers) makes a batch of some of the rows, in a second thread, while the one before
    is in use. done is the share of the training before this step. The order of an epoch follows
    from seed and its number alone, so a training can go on in the middle.
    """
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    total = num_epochs * steps_per_epoch
    steps = range(start, min(stop or total, total))

    def numbers_of_steps():
        for step in steps:
            epoch, place = divmod(step, steps_per_epoch)
            if step == start or place == 0:
                order = shuffled_rows(rows, [seed, epoch])
            yield order[place * batch_size : (place + 1) * batch_size]

    batches = prefetched(map(get_batch, numbers_of_steps()))
    for step, batch in zip(progress(steps, desc="training", unit="step"), batches, strict=True):
        yield step, step / total, batch


class CriteoVocabulary:
    """Which category has which row of a table, looked up in two memory-mapped files. Id 0: unknown.

    C1.npy holds the categories of ids 1, 2, ...: 8 hex digits, nothing for the missing one.
    C1_sorted.npy holds the places of C1.npy in the order of the categories.
    """

    def __init__(self, folder, name):
        self._categories = _mapped(folder / f"{name}.npy", "S8")
        self._sorter = _mapped(folder / f"{name}_sorted.npy", "i4")

    def __len__(self):
        return len(self._categories) + 1

    def encode(self, categories):
        """Ids (n,) int64 of categories: texts of 8 hex digits, None or "" where missing."""
        texts = [(category or "").lower() for category in categories]
        wrong = [text for text in texts if not re.fullmatch(FIELDS["C"], text)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not {WANTED['C']}")
        wanted = np.array(texts, dtype="S8")
        if len(self) == 1:
            return np.zeros(len(wanted), dtype=np.int64)
        place = np.searchsorted(self._categories, wanted, sorter=self._sorter)
        nearest = self._sorter[np.minimum(place, len(self._sorter) - 1)].astype(np.int64)
        return np.where(self._categories[nearest] == wanted, nearest + 1, 0)

    def decode(self, ids):
        """The categories of ids: a list; None for the missing one, `Vocabulary.UNKNOWN` for 0."""
        return [self._categories[i - 1].decode() or None if i else Vocabulary.UNKNOWN for i in ids]


def load_criteo(processed_folder):
    """Open a processed folder, whatever its size, in milliseconds, or raise CriteoFormatError."""
    folder = Path(processed_folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}; preprocess_criteo makes it")
    if folder.is_file():
        command = "python dlrm_utils.py preprocess RAW FOLDER"
        raise CriteoFormatError(f"{folder} is a file; processed data are a folder now: {command}")
    try:
        return CriteoData(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        found = f"{folder} is not a whole processed Criteo folder ({error})"
        raise CriteoFormatError(f"{found}; name another, or delete it and make it again") from error


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
    processed_folder: made before from the same rows and options, it is opened as it is; made from
    others, or holding something else, it is refused.
    min_count, max_table_rows: categories seen less often in blocks 1 to 6, or beyond that many
    table rows, become id 0 (unknown).
    Finished stages lie in processed_folder + ".making"; a run that was stopped goes on from there.
    Raises CriteoFormatError, naming file, line and column, for a malformed line; for under 7 rows.
    """
    raw, folder = Path(raw_data_file), Path(processed_folder)
    if not raw.is_file():
        raise FileNotFoundError(f"there is no raw file {raw}; data/README.md says where to get it")
    source = {"fingerprint": _fingerprint(raw)}
    source |= {"min_count": min_count, "max_table_rows": max_table_rows}
    if min_count < 1 or (max_table_rows is not None and max_table_rows < 1):
        raise ValueError(f"min_count and max_table_rows must be 1 or more: {source}")
    work = folder.with_name(f"{folder.name}.making")
    if work.exists() or not _in_use(folder):
        _make_alone(raw, folder, work, source, progress)
    data = load_criteo(folder)
    if data.source != source:
        found = f"{folder} was made from another raw file or with other options ({data.source})"
        raise ValueError(f"{found} than asked for ({source}); delete it, or name another folder")
    return data


def _fingerprint(path, samples=256, length=4096):
    """The file's size and a hash of pieces spread evenly over it: an edited file differs."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for k in range(samples):
            file.seek(max(size - length, 0) * k // (samples - 1))
            digest.update(file.read(length))
    return f"{size} bytes {digest.hexdigest()[:16]}"


def _in_use(path):
    return path.is_file() or (path.exists() and any(path.iterdir()))


def _make_alone(raw, folder, work, source, show):
    """Make the folder if no other process does. `work` then goes, unless we were stopped."""
    if _in_use(work) and not (work / "lock").exists():
        raise CriteoFormatError(f"{work} is in the way; move it, or name another folder")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            try:
                if not _in_use(folder):  # another process may just have made it
                    _make(raw, folder, work / "stages", source, show)
            except CriteoFormatError:
                _tidy(work)  # of no use: the raw file has to change first
                raise
            _tidy(work)
    except Timeout:
        if not _in_use(folder):
            raise RuntimeError(f"another process is making {folder}; wait for it") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            error.strerror = f"the disk is full; make room, run this again: {work} is kept"
        raise


def _tidy(work):
    shutil.rmtree(work / "stages", ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)  # the lock goes last: it shows that the rest was ours


def _make(raw, folder, stages, source, show):
    data, about = stages / "data", json.dumps({"format": FORMAT} | source)
    if not (data / "source.json").exists() or (data / "source.json").read_text() != about:
        shutil.rmtree(stages, ignore_errors=True)  # of another file, or with other options
        with _replacing(data / "source.json") as temporary:
            temporary.write_text(about)
    if not (stages / "parts").exists():
        _read_text(raw, stages / "unfinished", show)
        os.rename(stages / "unfinished", stages / "parts")
    parts = sorted((stages / "parts").iterdir())
    rows = _stored(parts, pl.len()).item() if parts else 0
    if rows < 7:
        raise CriteoFormatError(f"{raw} has {rows} rows; the seven blocks need at least one each")
    number = functools.partial(_number_column, stages, parts, source)
    numbered = _in_order(number, CATEGORIES, threads=2)  # 46 million rows of a column take 1 GB
    bar = {"desc": "numbering categories", "total": NUM_TABLES, "disable": not show}
    collections.deque(progress(numbered, **bar), maxlen=0)
    _write_arrays(stages, parts, rows, show)
    _flush(data / "vocabularies")
    _flush(data)
    if folder.exists():
        folder.rmdir()  # an empty one
    os.rename(data, folder)
    _flush(folder.parent)


def _read_text(raw, folder, show):
    """Stage 1: check every line, and store all columns as numbers, a file for each piece."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = pl.col(CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32)

    def parse(piece):
        first_line, text = piece
        table = _parsed(text, raw, first_line).with_columns(numbers).write_ipc(None)
        with _replacing(folder / f"{first_line:012}") as temporary:
            temporary.write_bytes(table.getbuffer())
        return len(text)

    total = None if raw.suffix in (".gz", ".tgz") else raw.stat().st_size
    bar = {"desc": f"reading {raw.name}", "unit": "B", "total": total, "disable": not show}
    with _unpacked(raw) as file:
        for _ in progress(_in_order(parse, _pieces(file, raw), threads=3), int, **bar):
            pass
    _flush(folder)


@contextlib.contextmanager
def _unpacked(raw):
    """The raw file, open; its bytes are those of the plain text."""
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
            line = line.removesuffix(b"\r").decode("ascii", "replace")
            _check_line(line, f"{name}, line {number}")
    options = {"separator": "\t", "has_header": False, "quote_char": None, "raise_if_empty": False}
    return pl.read_csv(text, schema=SCHEMA, **options)


def _check_line(line, place):
    """Name the first field that is not what it should be; slower than LINE, it knows more."""
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        column = min(len(fields), len(COLUMNS))
        found = f"{len(fields)} fields, not {len(COLUMNS)} separated by tabs"
        raise CriteoFormatError(f"{place}, column {column}: {found}")
    for k, (column, field) in enumerate(zip(COLUMNS, fields, strict=True), start=1):
        kind = column[0]
        ten_digits = kind == "I" and re.fullmatch("-?[0-9]{10}", field)
        sound = abs(int(field)) < 2**31 if ten_digits else re.fullmatch(FIELDS[kind], field)
        if not sound:
            found = f"{field[:40]!r} is not {WANTED[kind]}"
            raise CriteoFormatError(f"{place}, column {k} ({column}): {found}")


def _stored(parts, columns):
    return pl.scan_ipc(parts, glob=False).select(columns).collect()


def _number_column(stages, parts, source, name):
    """Stage 2: one column's vocabulary, counted on blocks 1 to 6, and the ids of all rows."""
    vocabularies, done = stages / "data" / "vocabularies", stages / "ids" / f"{name}.npy"
    if done.exists():
        return
    column = _stored(parts, pl.col(name).cast(pl.Int64).fill_null(-1)).to_series().to_numpy()
    codes, firsts = pd.factorize(column)  # codes count up by first sight
    del column  # 46 million rows of it are 0.4 GB
    train = codes[: _block_offsets(len(codes))[6]]
    order = _most_frequent(train, len(firsts), source["min_count"], source["max_table_rows"])
    kept = firsts[order]
    digits = np.frombuffer(kept.astype(">u4").tobytes().hex().encode(), "S8")
    ids = np.zeros(len(firsts), np.int32)
    ids[order] = np.arange(1, len(order) + 1)
    _save(vocabularies / f"{name}.npy", "S8", kept.shape, [np.where(kept < 0, b"", digits)])
    _save(vocabularies / f"{name}_sorted.npy", "i4", kept.shape, [np.argsort(kept)])
    _save(done, "i4", codes.shape, [ids[codes]])


def _write_arrays(stages, parts, rows, show, step=1 << 16):
    """Stage 3: labels, integers and ids, row by row."""
    columns = [np.load(stages / "ids" / f"{name}.npy", mmap_mode="r") for name in CATEGORIES]
    cuts = [slice(start, start + step) for start in range(0, rows, step)]
    pieces = {
        "labels": (_stored([part], "label").to_series().to_numpy() for part in parts),
        "dense": (_integers(_stored([part], INTEGERS)) for part in parts),
        "sparse": (np.stack([column[cut] for column in columns], axis=1) for cut in cuts),
    }
    for name, (dtype, row_shape) in ARRAYS.items():
        path = stages / "data" / f"{name}.npy"
        bar = {"desc": f"writing {path.name}", "unit": "row", "total": rows, "disable": not show}
        if not path.exists():
            _save(path, dtype, (rows, *row_shape), progress(pieces[name], len, **bar))


def _integers(frame):
    """The 13 integers, (n, 13) int32, `MISSING` where empty."""
    return frame.select(INTEGERS).fill_null(MISSING).to_numpy(order="c")


def _save(path, dtype, shape, pieces):
    """Write a .npy file piece by piece."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


# ---- MovieLens-100K ------------------------------------------------------------------------------
# The ratings lie as text in a wheel on the package registry; pip fetches it, nothing installs it.

MOVIELENS_PACKAGE = "recbole==1.2.1"
MOVIELENS_WHEEL = "recbole-1.2.1-py3-none-any.whl"
MOVIELENS_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"


def fetch_movielens(folder="data"):
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, one row a rating, by time.

    Columns: user_id, item_id, rating (1 to 5), timestamp, age, gender, occupation, zip_code, title,
    release_year, genres (a list). pip downloads the wheel into folder at first use.
    Raises ConnectionError where it cannot, ValueError where the wheel is not as published.
    """
    wheel, tables = Path(folder) / MOVIELENS_WHEEL, []
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = [*pip, "--only-binary=:all:", "--dest", folder, MOVIELENS_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            advice = "try again with a network, or see data/README.md"
            raise ConnectionError(f"MovieLens-100K cannot be fetched; {advice}: {done.stderr}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != MOVIELENS_SHA256:
        raise ValueError(f"{wheel} is not as published; delete it and call this again")
    for name in ("inter", "user", "item"):
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(f"recbole/dataset_example/ml-100k/ml-100k.{name}")
        table = pd.read_csv(io.BytesIO(text), sep="\t", quoting=3)  # headers like user_id:token
        tables.append(table.rename(columns=lambda header: header.split(":")[0]))
    ratings, people, films = tables
    films = films.rename(columns={"movie_title": "title", "class": "genres"})
    films["genres"] = films["genres"].str.split(" ")
    films["release_year"] = pd.to_numeric(films["release_year"], errors="coerce")
    ratings = ratings.astype({"timestamp": "int64", "rating": "int64"})
    frame = ratings.merge(people, on="user_id").merge(films, on="item_id")
    return frame.sort_values(["timestamp", "user_id", "item_id"], ignore_index=True)


def toy_ratings(rows=12_000):
    """Random ratings with the columns of `fetch_movielens`, for a machine without a network."""
    rng = np.random.default_rng(0)
    users, items = _long_tail(rng, 200, rows, 0.8), _long_tail(rng, 300, rows, 0.8)
    frame = pd.DataFrame({"user_id": users + 1, "item_id": items + 1, "timestamp": range(rows)})
    frame["rating"], frame["age"] = rng.integers(1, 6, rows), 18 + users % 50
    frame["gender"], frame["occupation"] = np.where(users % 3, "M", "F"), "artist"
    frame["zip_code"], frame["title"] = "00000", "Film " + frame["item_id"].astype(str)
    genres = [["Comedy"], ["Horror"], ["Action", "Drama"]]
    return frame.assign(release_year=1990.0, genres=[genres[item % 3] for item in items])


# ---- The notebook's own definitions --------------------------------------------------------------


def load_notebook(path="DLRM.ipynb"):
    """The notebook's imports, functions, classes, constants, and whole the cells tagged `example`.

    A namespace; nothing else of the notebook runs. A relative path is looked for beside this file.
    An import of a package that is not installed is left out, and so is what needs it.
    """
    path = Path(__file__).resolve().parent / path
    namespace, absent = {"__name__": path.name}, False
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        body = ast.parse("".join(cell["source"])).body if cell["cell_type"] == "code" else []
        is_example = "example" in cell["metadata"].get("tags", [])
        for statement in body if is_example else filter(_is_definition, body):
            code = compile(ast.Module([statement], []), path.name, "exec")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, namespace)
            except ModuleNotFoundError:
                absent = True
            except NameError:
                if not absent:
                    raise
    return types.SimpleNamespace(**namespace)


def _is_definition(statement):
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
        return ast.unparse(statement.targets[0]).isupper()
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


# ---- Drawing and exporting -----------------------------------------------------------------------


def render_graph(dot, path):
    """Draw a Graphviz graph (torchviz's, say) as SVG with the renderer that pip installed.

    torchviz names nodes by memory addresses; renumbered, the same graph gives the same file.
    """
    number, dot = {}, dot.copy()
    dot.node_attr.update(fontname="Courier New", margin="0.12,0.06")
    source = re.sub(r"\b\d{9,}\b", lambda a: str(number.setdefault(a[0], len(number))), dot.source)
    command = [Path(sys.executable).with_name("graphviz-pure"), "-Tsvg"]
    svg = subprocess.run(command, input=source.encode(), capture_output=True, check=True).stdout
    with _replacing(path) as temporary:  # monospace is as wide, where a browser lacks the font
        temporary.write_bytes(svg.replace(b'"Courier New"', b'"Courier New,monospace"'))


def _sum_bags(indices, weight, offsets, *options):
    """EmbeddingBag: add row indices[p] of the table to row b of the result, b being p's bag."""
    if "sum" not in options:
        raise ValueError('only nn.EmbeddingBag(mode="sum") is exported')
    starts = indices.new_zeros(indices.shape[0] + 1)  # how many bags start at each place
    starts = starts.scatter_add(0, offsets, torch.ones_like(offsets))
    bag = starts.cumsum(0)[:-1] - 1  # (nnz,) which bag a place belongs to
    sums = weight.new_zeros(offsets.shape[0], weight.shape[1])
    return sums.index_add(0, bag, weight.index_select(0, indices))  # (B, D)


@mock.patch.object(torch.nn.functional, "embedding_bag", _sum_bags)
def export_onnx(model, arguments, path, input_names, dynamic_shapes):
    """Write a model as one ONNX file with PyTorch's newer exporter, and without its chatter.

    arguments: an example call's (dense, indices, offsets); the rest as in torch.onnx.export.
    The older exporter fixes the example's bag sizes and fails on empty bags. The newer one writes
    an EmbeddingBag as a loop over bags; `_sum_bags` is the same in operators on whole tensors.
    """
    names = {"input_names": input_names, "output_names": ["logits"]}
    logging.disable(logging.WARNING)  # remarks about operators that a DLRM does not have
    try:
        with warnings.catch_warnings(action="ignore"):
            options = {"dynamo": True, "verbose": False, "dynamic_shapes": dynamic_shapes}
            program = torch.onnx.export(model.eval(), tuple(arguments), **names, **options)
    finally:
        logging.disable(logging.NOTSET)
    with _replacing(path) as temporary:
        program.save(temporary, external_data=False)


# ---- Commands ------------------------------------------------------------------------------------


def peak_memory():
    """The most memory this process has held, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Criteo files for DLRM.ipynb")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preprocess", help="raw Criteo text to the processed folder")
    command.add_argument("raw", metavar="RAW")
    command.add_argument("processed", metavar="PROCESSED")
    command.add_argument("--min-count", type=int, default=1, help="rarer categories become id 0")
    command.add_argument("--max-table-rows", type=int, help="at most this many rows a table")
    command = commands.add_parser("toy", help="write a toy file in the raw Criteo format")
    command.add_argument("out", metavar="OUT")
    command.add_argument("--rows", type=int, required=True)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--no-signal", action="store_true", help="labels are coin flips")
    o = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        if o.command == "toy":
            rows = len(write_toy_criteo(o.out, o.rows, o.seed, signal=not o.no_signal))
        else:
            rows = len(preprocess_criteo(o.raw, o.processed, o.min_count, o.max_table_rows))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_utils.py {o.command}: {error}")
    seconds, memory = time.perf_counter() - start, peak_memory()
    peak = f", peak memory {memory / 1e9:.2f} GB" if memory else ""
    print(f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s{peak}")


if __name__ == "__main__":
    main()
