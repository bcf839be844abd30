"""The companion of DLRM.ipynb: what turns tables of ids and numbers into model input.

In the order of the file: sparse indices/offsets converters, `Vocabulary`, `FrameEncoder`, toy clicks with a planted
truth, the Criteo preprocessing cache, MovieLens-100K, and two commands:

    python dlrm_utils.py toy data/toy.txt --rows 200000
    python dlrm_utils.py preprocess data/toy.txt data/toy.npz

Shapes: B rows in a batch, N rows in a file, nnz ids in a batch (all bags together), n_dense numeric columns.
"""
import argparse
import collections
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from numba import njit
from tqdm import tqdm


class Batch(NamedTuple):
    """Model input for B rows: every categorical column is a table with its own indices and offsets."""
    dense: torch.Tensor            # (B, n_dense) float32
    indices: list                  # one int64 tensor (nnz,) a table
    offsets: list                  # one int64 tensor (B,) a table: where each row's bag starts
    labels: torch.Tensor = None    # (B,) float32, or None

    def to(self, device):
        """The same batch on another device."""
        move = lambda tensors: [tensor.to(device) for tensor in tensors]
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.dense.to(device), move(self.indices), move(self.offsets), labels)

    def take(self, rows):
        """The batch of some of the rows, in the order given: a range, an array or a tensor of row numbers."""
        rows = torch.as_tensor(np.asarray(rows), dtype=torch.int64)
        indices, offsets = [], []
        for ids, starts in zip(self.indices, self.offsets):
            lengths = offsets_to_lengths(starts, len(ids))[rows]
            new_starts = lengths_to_offsets(lengths)
            # Position k of the new bag b is position k of its old bag: shift each bag from its new start to its old.
            shift = torch.repeat_interleave(starts[rows] - new_starts, lengths)
            indices.append(ids[shift + torch.arange(len(shift))])
            offsets.append(new_starts)
        return Batch(self.dense[rows], indices, offsets, None if self.labels is None else self.labels[rows])


def progress(items, size=None, **options):
    """Yield the items under a progress bar that leaves nothing behind, in a terminal or in a notebook cell.

    size(item) is what the bar counts (without it, items). options go to tqdm: desc, unit, total, disable.
    """
    in_notebook = "ipykernel" in sys.modules
    total = options.pop("total", None) or (len(items) if size is None and hasattr(items, "__len__") else None)
    with tqdm(total=total, file=sys.stdout if in_notebook else sys.stderr, leave=False, delay=0.5, unit_scale=True,
              **options) as bar:
        for item in items:
            yield item
            bar.update(1 if size is None else size(item))
    if in_notebook:
        from IPython.display import clear_output
        clear_output()


def prefetched(items, ahead=2):
    """The same items in the same order, each made in a second thread while the ones before it are in use."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as worker:
        waiting = collections.deque(worker.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(worker.submit(next, items, end))
            yield item


# ---- Sparse-offset converters -------------------------------------------------------------------------------------
# EmbeddingBag's convention: bag b is indices[offsets[b]:offsets[b + 1]], and the last bag runs to the end.

def to_offsets(bags):
    """Lay ragged bags of ids flat.

    bags: a sequence of sequences of ints, an array of equal rows, or a pandas Series of lists. Empty bags are kept.
    Returns (indices, offsets): int64 tensors of shape (nnz,) and (B,).
    Raises ValueError, naming the bag, for an id that is negative, fractional, boolean, missing or no number.
    """
    bags = [_ids_of_bag(bag, b) for b, bag in enumerate(bags)]
    ids = list(itertools.chain.from_iterable(bags))
    if any(kind is not int for kind in set(map(type, ids))):
        bags = [[_checked_id(i, b) for i in bag] for b, bag in enumerate(bags)]
        ids = list(itertools.chain.from_iterable(bags))
    if ids and not (min(ids) >= 0 and max(ids) < 2 ** 63):
        b, i = next((b, i) for b, bag in enumerate(bags) for i in bag if not 0 <= i < 2 ** 63)
        raise ValueError(f"bag {b} holds the id {i}; an id is a row number of a table, 0 or more (int64)")
    return torch.tensor(ids, dtype=torch.int64), lengths_to_offsets([len(bag) for bag in bags])


def _ids_of_bag(bag, b):
    if isinstance(bag, (np.ndarray, torch.Tensor, pd.Series)) and bag.ndim == 1:
        return bag.tolist()
    if isinstance(bag, (list, tuple, range)):
        return list(bag)
    raise ValueError(f"bag {b} is {bag!r}, not a sequence of ids; one id a row is written [id], no id []")


def _checked_id(i, b):
    """A Python int for any integer-valued number; bool is not a number here."""
    integral = isinstance(i, (int, np.integer)) or (isinstance(i, (float, np.floating)) and float(i).is_integer())
    if isinstance(i, bool) or not integral:
        raise ValueError(f"bag {b} holds {i!r}; an id is a whole number, not a fraction, a boolean or a missing value")
    return int(i)


def to_bags(indices, offsets):
    """The inverse of `to_offsets`: a list of B lists of ids.

    Raises ValueError where offsets fall, do not start at 0 or run past the end of indices.
    """
    indices = _int64_vector(indices, "indices")
    ends = _checked_offsets(offsets, len(indices))
    return [indices[start:end].tolist() for start, end in itertools.pairwise(ends.tolist())]


def offsets_to_lengths(offsets, nnz):
    """Bag lengths (B,) from offsets (B,) and the number of ids: TorchRec counts lengths, PyTorch counts offsets."""
    return _checked_offsets(offsets, nnz).diff()


def lengths_to_offsets(lengths):
    """Offsets (B,) from bag lengths (B,): offsets[b] is the number of ids before bag b."""
    lengths = _int64_vector(lengths, "lengths")
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"lengths[{int(lengths.argmin())}] is {int(lengths.min())}; a bag holds 0 or more ids")
    return lengths.cumsum(0) - lengths


def _checked_offsets(offsets, nnz):
    """Offsets with the closing offset nnz appended, (B + 1,), or ValueError."""
    offsets = _int64_vector(offsets, "offsets")
    if len(offsets) == 0 and nnz > 0:
        raise ValueError(f"there are {nnz} indices but no offsets; the first bag starts at offset 0")
    if len(offsets) and offsets[0] != 0:
        raise ValueError(f"offsets[0] is {int(offsets[0])}; the first bag starts at 0")
    closed = torch.cat([offsets, torch.tensor([nnz] if len(offsets) else [0])])
    if len(offsets) and int(closed.diff().min()) < 0:
        b = int((closed.diff() < 0).nonzero()[0])
        after = f"the next is {int(closed[b + 1])}" if b + 1 < len(offsets) else f"there are only {nnz} indices"
        raise ValueError(f"offsets[{b}] is {int(offsets[b])}, but {after}; offsets never fall and never pass the end")
    return closed


def _int64_vector(values, name):
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be one row of integers, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.to(torch.int64)


def to_keyed_jagged(batch):
    """The ids of a `Batch` as TorchRec's KeyedJaggedTensor: keys t0, t1, ... for its tables; lengths in place of offsets."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor           # only who uses TorchRec needs it
    lengths = [offsets_to_lengths(starts, len(ids)) for ids, starts in zip(batch.indices, batch.offsets, strict=True)]
    return KeyedJaggedTensor(keys=[f"t{t}" for t in range(len(lengths))], values=torch.cat(batch.indices), lengths=torch.cat(lengths))


# ---- Vocabulary ---------------------------------------------------------------------------------------------------

class Vocabulary:
    """Which value has which row of an embedding table.

    Id 0 is kept for values never seen in `fit`; the more frequent a value, the smaller its id (ties: first seen
    first). A missing value (None, NaN, NaT, pd.NA) is a value of its own and decodes to None.
    """
    UNKNOWN = "<unknown>"

    def __init__(self, values):
        """values: what ids 1, 2, 3, ... stand for, without repeats, None for the missing value."""
        self.values = list(values)
        is_missing = [value is None for value in self.values]
        self._missing_id = is_missing.index(True) + 1 if True in is_missing else 0
        self._index = pd.Index([value for value in self.values if value is not None])
        self._ids = np.flatnonzero(~np.array(is_missing, dtype=bool)) + 1

    @classmethod
    def fit(cls, values, min_count=1, max_size=None):
        """Count the values; keep those seen min_count times or more, and at most max_size table rows, id 0 included."""
        series = _as_series(values)
        codes, uniques = pd.factorize(series, use_na_sentinel=False)   # codes count up in order of first sight
        counts = np.bincount(codes, minlength=len(uniques))
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] >= min_count][:None if max_size is None else max(max_size - 1, 0)]
        return cls([None if pd.isna(value) else value for value in np.asarray(uniques, dtype=object)[order]])

    def __len__(self):
        return len(self.values) + 1

    def encode(self, values):
        """Ids of values, int64 of shape (len(values),); 0 where a value is unknown."""
        series = _as_series(values)
        position = self._index.get_indexer(pd.Index(series))           # -1 where not found
        ids = np.where(position >= 0, np.append(self._ids, 0)[position], 0)
        return np.where(series.isna(), self._missing_id, ids).astype(np.int64)

    def decode(self, ids):
        """The values of ids: a list; None for the missing value, `Vocabulary.UNKNOWN` for id 0."""
        ids = np.asarray(ids)
        if ids.size and not (0 <= ids.min() and ids.max() < len(self)):
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}; this vocabulary has ids 0 to {len(self) - 1}")
        return [self.UNKNOWN if i == 0 else self.values[i - 1] for i in ids.tolist()]


def _as_series(values):
    if isinstance(values, (pd.Series, np.ndarray)):
        return pd.Series(values)
    return pd.Series(list(values), dtype=object)


# ---- A DataFrame of one's own -------------------------------------------------------------------------------------

class FrameEncoder:
    """Turns a DataFrame into a `Batch`.

    dense: numeric columns; shifted and scaled to mean 0 and standard deviation 1 of the fitted frame, missing as 0.
    categorical: one value a row; a missing value is a value of its own.
    multi_hot: a list of values a row; an empty or missing list is an empty bag.
    label: a column of 0 and 1, put into `Batch.labels` where the frame has it.
    Tables come in the order categorical, then multi_hot. Rare values (seen less than min_count times) become id 0.
    """
    FORMAT = "dlrm_utils.FrameEncoder 1"

    def __init__(self, dense=(), categorical=(), multi_hot=(), label=None, min_count=1):
        self.dense, self.categorical, self.multi_hot = list(dense), list(categorical), list(multi_hot)
        self.label, self.min_count = label, min_count
        self.mean, self.std, self.vocabularies = {}, {}, {}

    def fit(self, frame):
        """Learn means, standard deviations and vocabularies; use the training rows alone. Returns self."""
        _require_columns(frame, self.dense + self.categorical + self.multi_hot)
        for column in self.dense:
            numbers = _numbers(frame, column)
            self.mean[column] = float(numbers.mean()) if numbers.notna().any() else 0.0
            self.std[column] = float(numbers.std(ddof=0)) or 1.0
        for column in self.categorical:
            self.vocabularies[column] = Vocabulary.fit(frame[column], self.min_count)
        for column in self.multi_hot:
            values, _ = _flatten_lists(frame, column)
            self.vocabularies[column] = Vocabulary.fit(values, self.min_count)
        return self

    @property
    def table_sizes(self):
        """Rows of each embedding table, in the order of `Batch.indices`."""
        self._require_fit()
        return [len(self.vocabularies[column]) for column in self.categorical + self.multi_hot]

    def transform(self, frame):
        """A `Batch` with the frame's rows in order."""
        self._require_fit()
        _require_columns(frame, self.dense + self.categorical + self.multi_hot)
        dense = np.zeros((len(frame), len(self.dense)), dtype=np.float32)
        for k, column in enumerate(self.dense):
            scaled = (_numbers(frame, column) - self.mean[column]) / self.std[column]
            dense[:, k] = scaled.fillna(0)
        indices, offsets = [], []
        for column in self.categorical:
            indices.append(torch.from_numpy(self.vocabularies[column].encode(frame[column])))
            offsets.append(torch.arange(len(frame)))
        for column in self.multi_hot:
            values, lengths = _flatten_lists(frame, column)
            indices.append(torch.from_numpy(self.vocabularies[column].encode(values)))
            offsets.append(lengths_to_offsets(lengths))
        return Batch(torch.from_numpy(dense), indices, offsets, self._labels(frame))

    def _labels(self, frame):
        if self.label is None or self.label not in frame:
            return None
        numbers = _numbers(frame, self.label)
        wrong = ~numbers.isin([0, 1])
        if wrong.any():
            row = wrong.idxmax()
            raise ValueError(f"label column {self.label!r}, row {row!r}: {frame[self.label][row]!r} is neither 0 nor 1")
        return torch.tensor(numbers.to_numpy(), dtype=torch.float32)

    def _require_fit(self):
        missing = [c for c in self.categorical + self.multi_hot if c not in self.vocabularies]
        if missing or any(column not in self.mean for column in self.dense):
            raise ValueError("this FrameEncoder has not seen a frame yet; call fit(frame) with the training rows first")

    def save(self, path):
        """Write everything that transform needs as JSON."""
        self._require_fit()
        vocabularies = {column: [_json_value(v, column) for v in vocabulary.values]
                        for column, vocabulary in self.vocabularies.items()}
        content = dict(format=self.FORMAT, dense=self.dense, categorical=self.categorical, multi_hot=self.multi_hot,
                       label=self.label, min_count=self.min_count, mean=self.mean, std=self.std,
                       vocabularies=vocabularies)
        with _replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != cls.FORMAT:
                raise KeyError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file that FrameEncoder.save wrote") from error
        encoder = cls(content["dense"], content["categorical"], content["multi_hot"], content["label"],
                      content["min_count"])
        encoder.mean, encoder.std = content["mean"], content["std"]
        encoder.vocabularies = {column: Vocabulary(values) for column, values in content["vocabularies"].items()}
        return encoder


def _require_columns(frame, columns):
    absent = [column for column in columns if column not in frame]
    if absent:
        raise ValueError(f"the frame has no column {absent[0]!r}; it has {list(frame.columns)}")


def _numbers(frame, column):
    try:
        numbers = pd.to_numeric(frame[column]).astype("float64")
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {column!r} is not numeric ({error}); name it in categorical instead") from error
    if np.isinf(numbers).any():
        raise ValueError(f"column {column!r}, row {np.isinf(numbers).idxmax()!r}: an infinite number")
    return numbers


def _flatten_lists(frame, column):
    """All values of a column of lists in one object array, and the length of each list."""
    lists = []
    for row, value in zip(frame.index, frame[column]):
        if isinstance(value, (list, tuple, np.ndarray)):
            lists.append(value)
        elif pd.isna(value):
            lists.append([])
        else:
            raise ValueError(f"multi-hot column {column!r}, row {row!r}: {value!r} is not a list of values")
    flat = np.empty(sum(map(len, lists)), dtype=object)
    flat[:] = list(itertools.chain.from_iterable(lists))
    return flat, [len(values) for values in lists]


def _json_value(value, column):
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(f"column {column!r} holds {value!r}; only texts and numbers can be saved: convert the column first")


class _replacing:
    """Write to a temporary name beside path and rename at the end, so that path is whole or absent."""

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        return self.temporary

    def __exit__(self, error_type, error, traceback):
        if error_type is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


# ---- Toy clicks with a planted truth ------------------------------------------------------------------------------

NUM_DENSE, NUM_TABLES = 13, 26
# Distinct values of the 26 categorical columns in Criteo's Kaggle file, as published; they add up to 33,762,577.
CRITEO_KAGGLE_TABLE_SIZES = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27,
                             14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
MISSING = np.iinfo(np.int32).min           # how `CriteoData.dense` marks an empty integer field


class ToyTruth:
    """The rule behind the toy clicks: what the data would tell a perfect reader.

        logit = bias + dense weights · z + sum of category effects
                + sum over pairs (j, k) of interacting fields of sign[j, k] · <vector_j, vector_k>

    where z is log(1 + max(x, 0)) of each integer, standardised. Field 0 of the interacting ones is the dense part,
    the others are five categorical columns. A category is known by its rank within its column, 0 the most
    frequent. The tail is quieter than the head: effects and vectors shrink with 1 / (1 + rank / 10).
    """
    PROTOTYPES, DIM, INTERACTING, HEAD, BASE_RATE = 1024, 2, 5, 10, 0.256

    def __init__(self, seed=0, signal=True):
        rng = np.random.default_rng([seed, 0])
        self.signal = signal
        self.log_mean = rng.uniform(0.5, 3.0, NUM_DENSE)
        self.log_std = rng.uniform(0.8, 1.6, NUM_DENSE)
        self.dense_missing = rng.permutation([0, 0, .01, .04, .04, .05, .2, .2, .22, .22, .45, .45, .75])
        self.sparse_missing = rng.permutation([0] * 15 + [.03] * 5 + [.12, .35, .44, .44, .5, .76])
        self.dense_weights = rng.normal(0, 0.25, NUM_DENSE)
        self.dense_projection = rng.normal(0, NUM_DENSE ** -0.5, (NUM_DENSE, self.DIM))
        self.effects = rng.normal(0, 0.35, (NUM_TABLES, self.PROTOTYPES))
        self.vectors = rng.normal(0, 0.8, (NUM_TABLES, self.PROTOTYPES, self.DIM))
        middling = [j for j, size in enumerate(CRITEO_KAGGLE_TABLE_SIZES)
                    if 10 <= size <= 6000 and self.sparse_missing[j] < 0.2]
        self.fields = np.sort(rng.permutation(middling)[:self.INTERACTING])
        signs = np.triu(rng.choice([-1.0, 1.0], (self.INTERACTING + 1,) * 2), 1)
        self.signs = signs + signs.T                                       # (6, 6), zero diagonal
        self.bias = 0.0
        self.bias = self._bias_for_base_rate(*self.draw(np.random.default_rng([seed, 1]), 100_000))

    def draw(self, rng, rows):
        """Features of rows impressions: integers (rows, 13) int32 and category ranks (rows, 26) int64, -1 missing."""
        counts = np.expm1(rng.normal(self.log_mean, self.log_std, (rows, NUM_DENSE)))
        dense = np.clip(counts, -1, 2 ** 31 - 1).astype(np.int32)
        dense[:, 1] -= 2                                                   # Criteo's I2 goes below zero, too
        dense[rng.random(dense.shape) < self.dense_missing] = MISSING
        ranks = np.stack([_long_tail(rng, size, rows) for size in CRITEO_KAGGLE_TABLE_SIZES], axis=1)
        ranks[rng.random(ranks.shape) < self.sparse_missing] = -1
        return dense, ranks

    def logit(self, dense, ranks):
        """True log-odds of a click, (rows,)."""
        z = np.where(dense == MISSING, 0, (_log_counts(dense) - self.log_mean) / self.log_std)
        z = np.clip(z, -3, 3)
        vectors = np.stack([z @ self.dense_projection] + [self.vector(j, ranks[:, j]) for j in self.fields], axis=1)
        pairs = np.einsum("bjd,bjd->b", vectors, np.einsum("jk,bkd->bjd", self.signs, vectors)) / 2
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
        """The 32-bit number that stands for a category in the file; no two ranks of a field share one."""
        return ((ranks.astype(np.uint64) + 1) * 2654435761 + int(field) * 2246822507 & 0xFFFFFFFF).astype(np.int64)

    def _loudness(self, ranks):
        return 1 / (1 + np.maximum(ranks, 0) / self.HEAD)

    def _bias_for_base_rate(self, dense, ranks):
        logits, low, high = self.logit(dense, ranks), -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if _sigmoid(logits + middle).mean() > self.BASE_RATE else (middle, high)
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
    """Write toy clicks in the raw Criteo format: label, 13 integers, 26 categories of 8 hex digits, tab-separated.

    Returns the true click probability of each row, (rows,) float64. The same seed writes the same rows, and a
    longer file starts with the shorter one. signal=False plants nothing: every row has the base rate.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a file has at least one row")
    truth, chunk, probabilities = ToyTruth(seed, signal), 20_000, []
    chunks = [(number, min(chunk, rows - start)) for number, start in enumerate(range(0, rows, chunk))]
    with _replacing(path) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        written = _in_order(pool, lambda job: _toy_lines(truth, np.random.default_rng([seed, 2, job[0]]), chunk, job[1]), chunks)
        for text, probability in progress(written, size=lambda result: len(result[1]), total=rows, desc="writing toy clicks", unit="row"):
            file.write(text.data)
            probabilities.append(probability)
    return np.concatenate(probabilities)


def _toy_lines(truth, rng, rows, keep):
    """The text of the first `keep` of some rows drawn from the truth, as bytes, and their click probabilities."""
    dense, ranks = truth.draw(rng, rows)
    probability = _sigmoid(truth.logit(dense, ranks))
    labels = rng.random(rows) < probability
    codes = np.stack([truth.code(j, ranks[:, j]) for j in range(NUM_TABLES)], axis=1)
    codes[ranks < 0] = ABSENT
    text = np.empty(keep * (2 + 12 * NUM_DENSE + 9 * NUM_TABLES), np.uint8)      # the longest that lines can be
    return text[:_format_lines(labels[:keep], dense, codes, text)], probability[:keep]


# ---- Criteo: from raw text to one memory-mapped file ---------------------------------------------------------------

COLUMNS = ["label"] + [f"I{k + 1}" for k in range(NUM_DENSE)] + [f"C{k + 1}" for k in range(NUM_TABLES)]
PROCESSED_FORMAT = "dlrm_utils.criteo 1"
ABSENT = -1                                # how raw category codes mark an empty field


class CriteoFormatError(ValueError):
    """A raw line or a processed file that is not what it should be; the message says where."""


class CriteoData:
    """Criteo rows on disk, in the raw file's order; nothing is read before it is asked for.

    labels (N,) uint8; dense (N, 13) int32 as read, `MISSING` where the field was empty; sparse (N, 26) int32 ids.
    table_sizes: 26 ints. block_offsets: 8 ints, the bounds of 7 equal blocks of rows. train, test, validation: ranges
    of rows: blocks 1 to 6, and the first and second half of block 7. vocabularies: one `CodeVocabulary` a table.
    """

    def __init__(self, path, arrays):
        self.path = Path(path)
        self.labels, self.dense, self.sparse = arrays["labels"], arrays["dense"], arrays["sparse"]
        starts = arrays["code_offsets"]
        self.vocabularies = [CodeVocabulary(arrays["codes"][start:end], arrays["by_code"][start:end])
                             for start, end in itertools.pairwise(starts.tolist())]
        self.table_sizes = [len(vocabulary) for vocabulary in self.vocabularies]
        self._touched, self._read = set(), set()               # runs: by the last batch; as a whole
        self.block_offsets = _block_offsets(len(self.labels))
        start, end = self.block_offsets[6:]
        middle = (start + end + 1) // 2
        self.train, self.test, self.validation = range(0, start), range(start, middle), range(middle, end)

    def __len__(self):
        return len(self.labels)

    def __repr__(self):
        return f"CriteoData({self.path.name}: {len(self):,} rows, {sum(self.table_sizes):,} table rows)"

    def batch(self, rows):
        """A `Batch` of the rows given by a range, a slice or row numbers: log(1 + max(x, 0)), missing as 0."""
        if isinstance(rows, range):                            # a contiguous piece of the file is read as such
            rows = slice(rows.start, rows.stop, rows.step) if len(rows) and rows.step > 0 else np.array(rows, int)
        if not isinstance(rows, slice):
            self._read_ahead(np.asarray(rows))
        return _criteo_batch(self.dense[rows], self.sparse[rows], self.labels[rows])

    def _read_ahead(self, rows):
        """Read a run of 1,024 rows as a whole once this batch and the last have touched it twice: see `shuffled_rows`.

        The memory map alone would fetch such a run page by page, which takes a cold disk over ten times as long.
        """
        runs, counts = np.unique(rows // RUN, return_counts=True)
        twice, runs = set(runs[counts > 1].tolist()), set(runs.tolist())
        wanted, self._touched = (twice | runs & self._touched) - self._read, runs
        if wanted:
            self._read = wanted if len(self._read) > 4 * RUNS_AT_ONCE else self._read | wanted
            with open(self.path, "rb", buffering=0) as file:
                for array in (self.labels, self.dense, self.sparse):
                    for run in sorted(wanted):
                        file.seek(array.offset + run * RUN * array.strides[0])
                        file.read(RUN * array.strides[0])      # what matters is that the system now holds these pages

    def encode(self, lines):
        """A `Batch` of raw Criteo lines (a list of texts, or one text), with or without the label column."""
        lines = lines.splitlines() if isinstance(lines, str) else list(lines)
        fields = {line.count("\t") + 1 for line in lines}
        labelled = fields != {len(COLUMNS) - 1}
        labels, dense, codes = _parse_lines(lines, "lines", 1, labelled)
        ids = np.stack([vocabulary.encode_codes(codes[:, j]) for j, vocabulary in enumerate(self.vocabularies)], axis=1)
        return _criteo_batch(dense, ids, labels if labelled else None)


def _criteo_batch(dense, ids, labels):
    ids = torch.from_numpy(np.ascontiguousarray(ids.T, dtype=np.int64))              # (26, B)
    offsets = torch.arange(ids.shape[1])                       # one id a field: every bag holds exactly one
    labels = None if labels is None else torch.from_numpy(labels.astype(np.float32))
    return Batch(torch.from_numpy(_log_counts(dense)), list(ids), [offsets] * NUM_TABLES, labels)


def _block_offsets(rows):
    """Bounds of the 7 blocks: equal, the first rows % 7 of them one row longer."""
    size, longer = divmod(rows, 7)
    return [b * size + min(b, longer) for b in range(8)]


RUN, RUNS_AT_ONCE = 1024, 256


def shuffled_rows(rows, seed, run=RUN, runs_at_once=RUNS_AT_ONCE):
    """Row numbers in a random order that suits a file larger than memory, (len(rows),) int64.

    Runs of 1,024 neighbouring rows are put in random order; then the rows of each 256 runs together, 262,144 rows, are
    mixed. While those are used, only their pages (41 MB of a processed Criteo file) need to be in memory, and the disk reads
    160 kB at a time. Up to 262,144 rows this is a plain random permutation.
    """
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, len(rows), run))
    order = (starts[:, None] + np.arange(run)).ravel()
    order = order[order < len(rows)]                           # the last run of the file may be shorter
    for start in range(0, len(order), run * runs_at_once):
        rng.shuffle(order[start:start + run * runs_at_once])
    return np.asarray(rows)[order] if not isinstance(rows, range) else rows.start + rows.step * order


class CodeVocabulary:
    """Which category has which row of a table, read from the processed file on demand.

    Id 0 is unknown. A category is 8 hex digits, or None where the field was empty.
    """

    def __init__(self, codes, by_code):
        """codes: the category of ids 1, 2, ...; by_code: the positions of codes in ascending order; both int64."""
        self._codes, self._by_code = codes, by_code

    def __len__(self):
        return len(self._codes) + 1

    def encode(self, categories):
        """Ids (n,) int64 of categories: texts of 8 hex digits, None or "" where missing."""
        return self.encode_codes(np.array([_parse_category(category or "") for category in categories], dtype=np.int64))

    def encode_codes(self, codes):
        """Ids (n,) int64 of categories given as numbers, `ABSENT` where missing."""
        if len(self._codes) == 0:
            return np.zeros(len(codes), dtype=np.int64)
        place = np.searchsorted(self._codes, codes, sorter=self._by_code)
        position = self._by_code[np.minimum(place, len(self._codes) - 1)]
        return np.where(self._codes[position] == codes, position + 1, 0)

    def decode(self, ids):
        """The categories of ids: a list; None for the missing one, `Vocabulary.UNKNOWN` for id 0."""
        codes = [None if i == 0 else int(self._codes[i - 1]) for i in ids]
        return [Vocabulary.UNKNOWN if code is None else None if code == ABSENT else f"{code:08x}" for code in codes]


def preprocess_criteo(raw_data_file, processed_data_file, min_count=1, max_table_rows=None, progress=True):
    """Turn raw Criteo text into one processed file and open it.

    raw_data_file: tab-separated label, 13 integers, 26 categories of 8 hex digits, an empty field is missing; plain, or
    packed as .gz, or as train.txt in a .tar.gz.
    processed_data_file: an uncompressed .npz of labels, dense, sparse and vocabularies. One made before from the same
    rows and options is opened as it is; one made from others is refused.
    min_count, max_table_rows: categories seen less often, or beyond that many table rows, become id 0 (unknown).
    Vocabularies are counted on blocks 1 to 6 alone.
    Finished blocks lie in processed_data_file + ".blocks" until all is done: a run that was stopped goes on from there.
    Raises CriteoFormatError, naming file, line and column, for a malformed line, and for fewer than seven rows.
    """
    raw, processed = Path(raw_data_file), Path(processed_data_file)
    if not raw.is_file():
        raise FileNotFoundError(f"there is no raw Criteo file {raw}; data/README.md says where to get one")
    if min_count < 1 or (max_table_rows is not None and max_table_rows < 1):
        raise ValueError(f"min_count is {min_count} and max_table_rows {max_table_rows}; both are 1 or more")
    source = dict(fingerprint=_fingerprint(raw), min_count=min_count, max_table_rows=max_table_rows)
    if not processed.exists():
        _make_processed_alone(raw, processed, source, progress)
    made_from = json.loads(str(_open_processed(processed)["source"]))
    if made_from != source:
        raise ValueError(f"{processed} was made from another raw file or with other options ({made_from}) than asked for "
                         f"({source}); delete it, or give another processed_data_file")
    return load_criteo(processed)


def _make_processed_alone(raw, processed, source, show):
    """Make the processed file if no other process does; afterwards the folder of blocks is gone, unless we were stopped."""
    folder = processed.with_name(processed.name + ".blocks")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if not processed.exists():                         # another process may just have finished it
                _make_processed(raw, processed, folder, source, show)
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        raise RuntimeError(f"another process is making {processed}; wait until it is done") from None
    except CriteoFormatError:
        shutil.rmtree(folder, ignore_errors=True)              # of no use: the raw file has to change first
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"the disk is full; {processed} needs about twice the size of its rows while it is "
                                    f"made. The finished blocks are kept: free some space and run this again") from error


def _make_processed(raw, processed, folder, source, show):
    """Raw text -> seven block files -> vocabularies -> the processed file."""
    if (folder / "raw").exists() and (folder / "raw").read_text() != source["fingerprint"]:
        for leftover in folder.glob("block*"):                 # of another raw file
            leftover.unlink()
    (folder / "raw").write_text(source["fingerprint"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        text = _unpacked(raw, folder)
        blocks = _write_blocks(pool, text, raw.name, folder, show)
        tables = range(NUM_TABLES)
        counting = _in_order(pool, lambda j: _rank_codes(blocks[:6], j, source["min_count"], source["max_table_rows"]), tables)
        codes = list(progress(counting, desc="counting categories", total=NUM_TABLES, unit="column", disable=not show))
        with _replacing(processed) as temporary:
            _write_npz(temporary, _processed_arrays(pool, blocks, codes, source, show))


def _unpacked(raw, folder):
    """The path of the raw file's plain text; a packed one is unpacked beside the blocks first."""
    if raw.suffix not in (".gz", ".tgz"):
        return raw
    text = folder / "block-text"
    if not text.exists():
        with contextlib.ExitStack() as stack, _replacing(text) as temporary:
            if raw.name.endswith((".tar.gz", ".tgz")):
                archive = stack.enter_context(tarfile.open(raw, "r|gz"))
                member = next((member for member in archive if Path(member.name).name == "train.txt"), None)
                if member is None:
                    raise CriteoFormatError(f"{raw} holds no train.txt")
                unpacked = archive.extractfile(member)
            else:
                unpacked = stack.enter_context(gzip.open(raw))
            with open(temporary, "wb") as file:
                shutil.copyfileobj(unpacked, file, 1 << 22)
    return text


def _in_order(pool, function, items):
    """Results of function(item), computed by the pool a few items ahead, in the order of the items."""
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > 2 * os.cpu_count():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# A block file holds one block's arrays end to end: codes (26, n) uint32, so that one table's codes lie together; dense
# (n, 13) int32; missing (n,) uint32, bit j set where category j is empty; labels (n,) uint8.

class _Block(NamedTuple):
    path: Path
    rows: int

    BYTES_A_ROW = 4 * NUM_TABLES + 4 * NUM_DENSE + 4 + 1

    def read(self, name, start, rows, table=0):
        """Rows start to start + rows of one array (of one table's codes, for "codes")."""
        dtype, width, offset = {"codes": (np.uint32, 1, 4 * self.rows * table),
                                "dense": (np.int32, NUM_DENSE, 4 * self.rows * NUM_TABLES),
                                "missing": (np.uint32, 1, 4 * self.rows * (NUM_TABLES + NUM_DENSE)),
                                "labels": (np.uint8, 1, 4 * self.rows * (NUM_TABLES + NUM_DENSE + 1))}[name]
        offset += start * width * np.dtype(dtype).itemsize
        values = np.fromfile(self.path, dtype, rows * width, offset=offset)
        return values.reshape(-1, NUM_DENSE) if name == "dense" else values

    def write(self, file, start, labels, dense, codes, missing):
        """Put rows from start on in their places in an open file."""
        rows, width = self.rows, NUM_TABLES + NUM_DENSE
        for j in range(NUM_TABLES):
            file.seek(4 * (rows * j + start))
            file.write(codes[j].data)
        for offset, values in [(4 * (rows * NUM_TABLES + start * NUM_DENSE), dense), (4 * (rows * width + start), missing),
                               (4 * rows * (width + 1) + start, labels)]:
            file.seek(offset)
            file.write(values.data)

    def pieces(self, length=1 << 14):
        """(start, rows) of pieces that together are the block."""
        return [(start, min(length, self.rows - start)) for start in range(0, self.rows, length)]


def _write_blocks(pool, text, name, folder, show):
    """Parse the text into seven block files; those finished by an earlier run are kept."""
    lines = _line_index(pool, text, name, show)
    total = lines[-1][2] + lines[-1][3] if lines else 0
    if total < 7:
        raise CriteoFormatError(f"{name} has {total} rows; the seven blocks need at least one row each")
    bounds = _block_offsets(total)
    blocks = [_Block(folder / f"block_{b + 1}", end - start) for b, (start, end) in enumerate(itertools.pairwise(bounds))]
    missing_blocks = [b for b, block in enumerate(blocks)
                      if not block.path.exists() or block.path.stat().st_size != block.rows * block.BYTES_A_ROW]
    jobs = [(b, piece) for b in missing_blocks for piece in _pieces_of_rows(text, lines, bounds[b], bounds[b + 1])]
    parsed = _in_order(pool, lambda job: (job, _parse_piece(text, name, *job[1])), jobs)
    parsed = progress(parsed, size=lambda result: result[0][1][3], total=sum(job[1][3] for job in jobs),
                      desc=f"reading {name}", unit="row", disable=not show)
    for b, results in itertools.groupby(parsed, key=lambda result: result[0][0]):
        with _replacing(blocks[b].path) as temporary, open(temporary, "wb") as file:
            for (_, (_, _, first_row, _)), arrays in results:
                blocks[b].write(file, first_row - bounds[b], *arrays)
    return blocks


def _line_index(pool, text, name, show, length=1 << 22):
    """The text as pieces of whole lines, about 4 MB each: (start, end, first row, rows), start and end in bytes."""
    size = text.stat().st_size
    starts = range(0, size, length)
    counted = _in_order(pool, lambda start: _count_newlines(np.fromfile(text, np.uint8, length, offset=start)), starts)
    pieces, begin, row = [], 0, 0
    for start, (newlines, last) in zip(starts, progress(counted, desc="counting lines", total=len(starts), disable=not show)):
        if newlines:
            pieces.append((begin, start + last + 1, row, newlines))
            begin, row = start + last + 1, row + newlines
        elif start + length - begin > 4 * length:
            raise CriteoFormatError(f"{name}, line {row + 1}, column 1: a line of more than {4 * length:,} bytes")
    if begin < size:                                           # a last line without a newline
        pieces.append((begin, size, row, 1))
    return pieces


def _pieces_of_rows(text, lines, first, end):
    """The pieces of the line index that hold rows first to end - 1, cut where a block begins or ends inside one."""
    for start, stop, row, rows in lines:
        if row < end and row + rows > first:
            if row < first or row + rows > end:
                newlines = np.flatnonzero(np.fromfile(text, np.uint8, stop - start, offset=start) == ord("\n"))
                if row + rows > end:
                    stop, rows = start + int(newlines[end - row - 1]) + 1, end - row
                if row < first:
                    start, row, rows = start + int(newlines[first - row - 1]) + 1, first, row + rows - first
            yield start, stop, row, rows


def _parse_piece(text, name, start, stop, first_row, rows):
    """labels (n,), dense (n, 13), codes (26, n), missing (n,) of the lines between two places of the text."""
    buffer = np.zeros(stop - start + 64, dtype=np.uint8)       # the parser may look a few bytes ahead
    buffer[:stop - start] = np.fromfile(text, np.uint8, stop - start, offset=start)
    if buffer[stop - start - 1] != ord("\n"):
        buffer[stop - start] = ord("\n")
    arrays = (np.empty(rows, np.uint8), np.empty((rows, NUM_DENSE), np.int32), np.empty((NUM_TABLES, rows), np.uint32),
              np.empty(rows, np.uint32))
    parsed = _parse_text(buffer, *arrays)
    if parsed < rows:                                          # let the slow parser say what is wrong with that line
        line = bytes(buffer[:stop - start]).split(b"\n")[parsed].decode("ascii", "replace")
        _parse_lines([line], name, first_row + parsed + 1)
        raise AssertionError(f"{name}, line {first_row + parsed + 1}: the two parsers disagree on {line!r}")
    return arrays


def _rank_codes(blocks, table, min_count, max_table_rows):
    """The categories of one table, most frequent first, ties by first sight: (n,) int64, `ABSENT` for the missing one."""
    slots = np.zeros(1 << 12, np.uint64)
    keys, counts = np.empty(slots.size // 2 + 1, np.uint32), np.zeros(slots.size // 2 + 1, np.int64)
    state = np.array([0, -1])                                  # categories so far; which of them is the missing one
    for block in blocks:
        for start, rows in block.pieces(1 << 20):
            codes, missing, done = block.read("codes", start, rows, table), block.read("missing", start, rows), 0
            while (done := done + _count_codes(codes[done:], missing[done:], table, slots, keys, counts, state)) < rows:
                slots = np.zeros(2 * slots.size, np.uint64)    # half full: double it
                keys, counts = [np.concatenate([old, np.zeros(slots.size // 4, old.dtype)]) for old in (keys, counts)]
                _fill_slots(keys[:state[0]], state[1], slots)
    values, counts = keys[:state[0]].astype(np.int64), counts[:state[0]]
    if state[1] >= 0:
        values[state[1]] = ABSENT
    order = np.argsort(-counts, kind="stable")
    order = order[:np.count_nonzero(counts >= min_count)][:None if max_table_rows is None else max_table_rows - 1]
    return values[order]


def _processed_arrays(pool, blocks, codes, source, show):
    """What the processed file holds: (name, dtype, shape, pieces in order)."""
    total = sum(block.rows for block in blocks)
    pieces = [(block, start, rows) for block in blocks for start, rows in block.pieces()]
    lookups = [_lookup_table(column) for column in codes]
    sparse = _in_order(pool, lambda piece: _encode_piece(*piece, lookups), pieces)
    sparse = progress(sparse, size=len, total=total, desc="numbering categories", unit="row", disable=not show)
    yield "labels", np.uint8, (total,), (block.read("labels", start, rows) for block, start, rows in pieces)
    yield "dense", np.int32, (total, NUM_DENSE), (block.read("dense", start, rows) for block, start, rows in pieces)
    yield "sparse", np.int32, (total, NUM_TABLES), sparse
    offsets = np.cumsum([0] + [len(column) for column in codes])
    yield "codes", np.int64, (offsets[-1],), codes
    yield "by_code", np.int64, (offsets[-1],), _in_order(pool, np.argsort, codes)
    yield "code_offsets", np.int64, offsets.shape, [offsets]
    for name, content in [("source", json.dumps(source)), ("format", PROCESSED_FORMAT)]:
        yield name, np.array(content).dtype, (), [np.array(content)]


def _lookup_table(codes):
    """(slots, id of the missing category): a hash table from code to id, at most 0.7 full."""
    slots = np.zeros(1 << max(int(np.ceil(np.log2(len(codes) / 0.7 + 1))), 2), np.uint64)
    absent = np.flatnonzero(codes == ABSENT)
    absent = int(absent[0]) if len(absent) else -1
    _fill_slots(codes.astype(np.uint32), absent, slots)
    return slots, absent + 1


def _encode_piece(block, start, rows, lookups):
    """Ids (n, 26) int32 of some rows of a block."""
    ids, missing = np.empty((rows, NUM_TABLES), np.int32), block.read("missing", start, rows)
    for j, (slots, missing_id) in enumerate(lookups):
        _encode_codes(block.read("codes", start, rows, j), missing, j, slots, missing_id, ids[:, j])
    return ids


# The functions below are compiled by Numba, and run without Python's lock: two threads use two cores. A hash table is an
# array of slots, each 0 or (code << 32) + number; a code's search starts at its hash and goes on to the next slot.

_compiled = njit(nogil=True, cache=True)


@_compiled
def _count_newlines(buffer):
    """Number of newlines, and the place of the last one (-1 if there is none)."""
    count, last = 0, -1
    for place in range(buffer.size):
        count += buffer[place] == 10
    for place in range(buffer.size - 1, -1, -1):
        if buffer[place] == 10:
            last = place
            break
    return count, last


@_compiled
def _parse_text(buffer, labels, dense, codes, missing):
    """Parse as many lines as labels has places; returns how many were well-formed before the first bad one."""
    place = 0
    for row in range(labels.size):
        if (buffer[place] != 48 and buffer[place] != 49) or buffer[place + 1] != 9:
            return row
        labels[row] = buffer[place] - 48
        place += 2
        for k in range(13):
            negative = buffer[place] == 45
            place += negative
            number, digits = np.int64(0), 0
            while 48 <= buffer[place] <= 57 and digits < 11:
                number = 10 * number + (buffer[place] - 48)
                digits += 1
                place += 1
            if buffer[place] != 9 or digits > 10 or number > 2147483647 or (negative and digits == 0):
                return row
            dense[row, k] = -2147483648 if digits == 0 else -number if negative else number
            place += 1
        empty = np.uint32(0)
        for k in range(26):
            code = np.uint32(0)
            if buffer[place] == 9 or buffer[place] == 10 or buffer[place] == 13:
                empty |= np.uint32(1) << np.uint32(k)
            else:
                for _ in range(8):
                    char = buffer[place]
                    if 48 <= char <= 57:
                        digit = char - 48
                    elif 97 <= char <= 102:
                        digit = char - 87
                    elif 65 <= char <= 70:
                        digit = char - 55
                    else:
                        return row
                    code = (code << np.uint32(4)) | np.uint32(digit)
                    place += 1
            codes[k, row] = code
            if k < 25:
                if buffer[place] != 9:
                    return row
                place += 1
        missing[row] = empty
        place += buffer[place] == 13
        if buffer[place] != 10:
            return row
        place += 1
    return labels.size


@_compiled
def _format_lines(labels, dense, codes, text):
    """Write raw Criteo lines into text; returns the number of bytes."""
    place = 0
    for row in range(labels.size):
        text[place] = 48 + labels[row]
        place += 1
        for k in range(13):
            text[place] = 9
            place += 1
            number = np.int64(dense[row, k])
            if number == -2147483648:
                continue
            if number < 0:
                text[place] = 45
                place, number = place + 1, -number
            power = 1
            while 10 * power <= number:
                power *= 10
            while power > 0:
                text[place] = 48 + number // power % 10
                place, power = place + 1, power // 10
        for k in range(26):
            text[place] = 9
            place += 1
            if codes[row, k] >= 0:
                for shift in range(28, -1, -4):
                    digit = codes[row, k] >> shift & 15
                    text[place] = 48 + digit if digit < 10 else 87 + digit
                    place += 1
        text[place] = 10
        place += 1
    return place


@_compiled
def _first_slot(code, slots):
    """Where the search for a code starts: the code's bits well mixed, so that similar codes spread."""
    mixed = np.uint32(code)
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.int64(mixed ^ (mixed >> np.uint32(16))) & (slots.size - 1)


@_compiled
def _find(code, slots):
    """The slot that holds a code, or the empty one where it belongs."""
    slot = _first_slot(code, slots)
    while slots[slot] != 0 and np.uint32(slots[slot] >> np.uint64(32)) != code:
        slot = (slot + 1) & (slots.size - 1)
    return slot


@_compiled
def _fill_slots(codes, missing_place, slots):
    """Number codes[0], codes[1], ... as 1, 2, ... in an empty hash table, leaving out the missing category."""
    for place in range(codes.size):
        if place != missing_place:
            slots[_find(codes[place], slots)] = (np.uint64(codes[place]) << np.uint64(32)) | np.uint64(place + 1)


@_compiled
def _count_codes(codes, missing, table, slots, keys, counts, state):
    """Count codes until the hash table is half full; returns how many. state: [categories, place of the missing one]."""
    for row in range(codes.size):
        if 2 * state[0] >= slots.size:
            return row
        if missing[row] >> np.uint32(table) & np.uint32(1):
            if state[1] < 0:
                state[1] = state[0]
                keys[state[0]] = 0
                state[0] += 1
            counts[state[1]] += 1
        else:
            slot = _find(codes[row], slots)
            if slots[slot] == 0:
                keys[state[0]] = codes[row]
                state[0] += 1
                slots[slot] = (np.uint64(codes[row]) << np.uint64(32)) | np.uint64(state[0])
            counts[np.int64(slots[slot] & np.uint64(0xFFFFFFFF)) - 1] += 1
    return codes.size


@_compiled
def _encode_codes(codes, missing, table, slots, missing_id, ids):
    """Write the id of each code, 0 where it is unknown."""
    for row in range(codes.size):
        if missing[row] >> np.uint32(table) & np.uint32(1):
            ids[row] = missing_id
        else:
            ids[row] = slots[_find(codes[row], slots)] & np.uint64(0xFFFFFFFF)


def load_criteo(processed_data_file):
    """Open a processed file, whatever its size, in milliseconds. Raises CriteoFormatError if it is not one."""
    if not Path(processed_data_file).is_file():
        raise FileNotFoundError(f"there is no processed file {processed_data_file}; preprocess_criteo makes it")
    return CriteoData(processed_data_file, _open_processed(processed_data_file))


def _open_processed(path):
    try:
        arrays = _map_npz(path)
        if str(arrays["format"]) == PROCESSED_FORMAT:
            return arrays
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, struct.error) as error:
        raise CriteoFormatError(f"{path} is not a whole processed Criteo file ({error}); make it again") from error
    raise CriteoFormatError(f"{path} has the format {arrays['format']}, not {PROCESSED_FORMAT!r}; make it again")


def _fingerprint(path, samples=256, length=4096):
    """The file's size and a hash of pieces spread evenly over it: another file, or an edited one, differs."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for k in range(samples):
            file.seek(max(size - length, 0) * k // (samples - 1))
            digest.update(file.read(length))
    return f"{size} bytes {digest.hexdigest()[:16]}"


def _parse_lines(lines, path, first_line, labelled=True):
    """labels (n,) uint8, dense (n, 13) int32 and codes (n, 26) int64 of raw lines, every field checked and named.

    For a few lines, and to say what is wrong with one; `_parse_text` is the fast one.
    """
    columns = COLUMNS if labelled else COLUMNS[1:]
    labels = np.zeros(len(lines), dtype=np.uint8)
    dense = np.empty((len(lines), NUM_DENSE), dtype=np.int32)
    codes = np.empty((len(lines), NUM_TABLES), dtype=np.int64)
    for n, line in enumerate(lines):
        fields = line.removesuffix("\n").removesuffix("\r").split("\t")
        if len(fields) != len(columns):
            raise CriteoFormatError(f"{path}, line {first_line + n}, column {min(len(fields), len(columns))}: "
                                    f"{len(fields)} fields, not {len(columns)} separated by tabs")
        values = []
        for column, field in zip(columns, fields):
            try:
                values.append(_PARSERS[column[0]](field))
            except ValueError as error:
                raise CriteoFormatError(f"{path}, line {first_line + n}, column {columns.index(column) + 1} "
                                        f"({column}): {field!r} is not {error}") from None
        if labelled:
            labels[n] = values.pop(0)
        dense[n], codes[n] = values[:NUM_DENSE], values[NUM_DENSE:]
    return labels, dense, codes


def _parse_label(field):
    if field not in ("0", "1"):
        raise ValueError("a label, 0 or 1")
    return int(field)


def _parse_integer(field):
    if field == "":
        return MISSING
    digits = field[1:] if field[0] == "-" else field
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10) or not MISSING < int(field) < 2 ** 31:
        raise ValueError("an integer of 32 bits")
    return int(field)


def _parse_category(field):
    if field == "":
        return ABSENT
    if len(field) != 8 or not set(field) <= set("0123456789abcdefABCDEF"):
        raise ValueError("a category of 8 hex digits")
    return int(field, 16)


_PARSERS = {"l": _parse_label, "I": _parse_integer, "C": _parse_category}


# An uncompressed .npz is a zip of plain .npy files. NumPy writes it; the two functions below only add that each array
# starts at a multiple of 64 bytes, so that it can be memory-mapped. `numpy.load(path)` reads the same file whole.

def _write_npz(path, arrays):
    """Write (name, dtype, shape, pieces) one after the other; the pieces, in order, are the array."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, dtype, shape, pieces in arrays:
            member = zipfile.ZipInfo(name + ".npy")            # dated 1980: the same rows give the same bytes
            local_header = 30 + len(member.filename) + 20 + 4              # fixed part, name, zip64 sizes, padding tag
            padding = -(archive.fp.tell() + local_header) % 64
            member.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
            with archive.open(member, "w", force_zip64=True) as file:
                description = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=tuple(map(int, shape)))
                np.lib.format.write_array_header_1_0(file, description)
                for piece in pieces:
                    file.write(np.ascontiguousarray(piece, dtype).data)


def _map_npz(path):
    """Every array of an uncompressed .npz: small ones read, large ones memory-mapped read-only."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            file.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{member.filename} is of another .npy version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise ValueError(f"{member.filename} holds Python objects")
            if file.tell() + dtype.itemsize * int(np.prod(shape)) > os.path.getsize(path):
                raise ValueError(f"{member.filename} is cut off")
            mapped = np.memmap(path, dtype, "r", file.tell(), shape) if np.prod(shape) else np.empty(shape, dtype)
            arrays[member.filename.removesuffix(".npy")] = mapped
    return arrays


# ---- MovieLens-100K -----------------------------------------------------------------------------------------------
# The ratings lie as text in a wheel on the package registry; the wheel is fetched with pip, never installed or run.

MOVIELENS_WHEEL = "recbole==1.2.1"
MOVIELENS_FOLDER = "recbole/dataset_example/ml-100k/"
MOVIELENS_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


def fetch_movielens(folder="data"):
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, one row a rating, in order of time.

    Columns: user_id, item_id, rating (1 to 5), timestamp, age, gender, occupation, zip_code, title, release_year,
    genres (a list). The three text files are fetched into folder at first use and their checksums verified.
    Raises ConnectionError where they cannot be fetched, ValueError where a file is not the published one.
    """
    folder = Path(folder) / "ml-100k"
    if not all((folder / name).is_file() for name in MOVIELENS_SHA256):
        _download_movielens(folder)
    for name, published in MOVIELENS_SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != published:
            raise ValueError(f"{folder / name} is not the published file (its SHA-256 differs); "
                             f"delete it and call fetch_movielens again")
    # Atomic files: a header like "user_id:token", tab-separated, texts unquoted
    read = lambda name: pd.read_csv(folder / name, sep="\t", quoting=3).rename(columns=lambda c: c.split(":")[0])
    items = read("ml-100k.item").rename(columns={"movie_title": "title", "class": "genres"})
    items["genres"] = items["genres"].str.split(" ")
    items["release_year"] = pd.to_numeric(items["release_year"], errors="coerce")
    ratings = read("ml-100k.inter").astype({"timestamp": "int64", "rating": "int64"})
    frame = ratings.merge(read("ml-100k.user"), on="user_id").merge(items, on="item_id")
    return frame.sort_values(["timestamp", "user_id", "item_id"], ignore_index=True)


def _download_movielens(folder):
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--dest", temporary, MOVIELENS_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ConnectionError(f"MovieLens-100K could not be fetched ({reason}). With a network, run this again; "
                                  f"without one, copy {', '.join(MOVIELENS_SHA256)} into {folder}: see data/README.md")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in MOVIELENS_SHA256:
                with _replacing(folder / name) as part:
                    part.write_bytes(wheel.read(MOVIELENS_FOLDER + name))


def toy_ratings(rows=12_000, seed=0):
    """Random ratings with the columns of `fetch_movielens`, for a machine without a network: nothing to learn here."""
    rng = np.random.default_rng(seed)
    users, items = _long_tail(rng, 200, rows, 0.8), _long_tail(rng, 300, rows, 0.8)
    genres = np.array([["Comedy"], ["Horror"], ["Comedy", "Horror"], ["Drama"], ["Action", "Drama"]], dtype=object)
    return pd.DataFrame(dict(
        user_id=users + 1, item_id=items + 1, rating=rng.integers(1, 6, rows), timestamp=np.arange(rows),
        age=18 + users % 50, gender=np.where(users % 3, "M", "F"), occupation=np.where(users % 2, "artist", "engineer"),
        zip_code="00000", title=[f"Film {item + 1}" for item in items], release_year=1990.0 + items % 9,
        genres=genres[items % len(genres)]))


# ---- Drawing and exporting ----------------------------------------------------------------------------------------

def render_graph(dot, path):
    """Draw a Graphviz graph (torchviz's, say) as SVG, with the renderer that pip installed: no system program needed.

    torchviz names its nodes by memory addresses; they are renumbered, so that the same graph gives the same file.
    """
    number, dot = {}, dot.copy()
    dot.node_attr.update(fontname="Courier New", margin="0.12,0.06")
    source = re.sub(r"\b\d{9,}\b", lambda address: str(number.setdefault(address[0], len(number))), dot.source)
    program = shutil.which("graphviz-pure", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath,
                                                                  os.environ.get("PATH", "")]))
    if program is None:
        raise FileNotFoundError("no program graphviz-pure; pip install -r requirements.txt brings it")
    svg = subprocess.run([program, "-Tsvg"], input=source.encode(), capture_output=True, check=True).stdout
    svg = svg.replace(b'"Courier New"', b'"Courier New,monospace"')       # as wide, where a browser lacks the first
    with _replacing(path) as temporary:
        temporary.write_bytes(svg)


def export_onnx(model, arguments, path, input_names, dynamic_shapes):
    """Write a model as one ONNX file with PyTorch's newer exporter, and without its chatter.

    arguments: an example call's (dense, indices, offsets); input_names and dynamic_shapes as in torch.onnx.export.
    The older exporter fixes the example's bag sizes into the file and fails on empty bags. The newer one writes an
    EmbeddingBag as a loop over bags; `_summed_bags` writes it as five operators on whole tensors instead.
    """
    logging.disable(logging.WARNING)                           # remarks about operators that a DLRM does not have
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(), tuple(arguments), dynamo=True, verbose=False, input_names=input_names,
                output_names=["logits"], dynamic_shapes=dynamic_shapes,
                custom_translation_table={torch.ops.aten.embedding_bag.padding_idx: _summed_bags})
        with _replacing(path) as temporary:
            program.save(temporary, external_data=False)
    finally:
        logging.disable(logging.NOTSET)


def _summed_bags(weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None,
                 include_last_offset=False, padding_idx=-1):
    """EmbeddingBag in ONNX operators: add row indices[p] of the table to row b of the result, b being p's bag."""
    from onnxscript import opset18 as op
    if mode != 0 or per_sample_weights is not None or include_last_offset:
        raise ValueError('only nn.EmbeddingBag(mode="sum"), without weights and closing offset, is exported')
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    nnz, rows = op.Shape(indices), op.Shape(offsets)
    # How many bags start at each place; summed up, which bag a place belongs to. An empty bag starts where the next does.
    no_starts = op.Expand(zero, op.Add(nnz, one))
    starts = op.ScatterElements(no_starts, offsets, op.Expand(one, rows), axis=0, reduction="add")     # (nnz + 1,)
    bag = op.Slice(op.Sub(op.CumSum(starts, op.Constant(value_int=0)), one), zero, nnz)                # (nnz,)
    zeros = op.Expand(op.Constant(value_float=0.0), op.Concat(rows, op.Shape(weight, start=1), axis=0))
    sums = op.ScatterND(zeros, op.Unsqueeze(bag, one), op.Gather(weight, indices), reduction="add")    # (B, D)
    return sums, zero, zero, zero                              # PyTorch's operator has three more results, unused here


# ---- Commands -----------------------------------------------------------------------------------------------------

def peak_memory():
    """The most memory this process has held, in bytes; None where the system does not tell."""
    try:                                                       # Linux; getrusage there counts the parent's memory, too
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:                                        # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="dlrm_utils.py", description="Criteo files for DLRM.ipynb")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preprocess", help="raw Criteo text to the processed file")
    command.add_argument("raw", metavar="RAW")
    command.add_argument("processed", metavar="PROCESSED")
    command.add_argument("--min-count", type=int, default=1, help="rarer categories become id 0")
    command.add_argument("--max-table-rows", type=int, help="keep at most this many rows a table, id 0 included")
    command = commands.add_parser("toy", help="write a toy file in the raw Criteo format")
    command.add_argument("out", metavar="OUT")
    command.add_argument("--rows", type=int, required=True)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--no-signal", action="store_true", help="plant no signal: labels are coin flips")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        if options.command == "toy":
            rows = len(write_toy_criteo(options.out, options.rows, options.seed, not options.no_signal))
        else:
            rows = len(preprocess_criteo(options.raw, options.processed, options.min_count, options.max_table_rows))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_utils.py {options.command}: {error}")
    seconds, memory = time.perf_counter() - start, peak_memory()
    print(f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s"
          + (f", peak memory {memory / 1e9:.2f} GB" if memory else ""))


if __name__ == "__main__":
    main()
