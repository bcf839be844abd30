"""The companion of DLRM.ipynb: what turns tables of ids and numbers into model input.

In the order of the file: sparse indices/offsets converters, `Vocabulary`, `FrameEncoder`, toy clicks with a planted
truth, the Criteo preprocessing cache, MovieLens-100K, and two commands:

    python dlrm_utils.py toy data/toy.txt --rows 200000
    python dlrm_utils.py preprocess data/toy.txt data/toy.npz

Shapes: B rows in a batch, N rows in a file, nnz ids in a batch (all bags together), n_dense numeric columns.
"""
import argparse
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
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
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


def progress(items, **options):
    """Yield the items under a progress bar that leaves nothing behind, in a terminal or in a notebook cell.

    options go to tqdm: desc, unit, total, disable.
    """
    in_notebook = "ipykernel" in sys.modules
    yield from tqdm(items, file=sys.stdout if in_notebook else sys.stderr, leave=False, delay=0.5, **options)
    if in_notebook:
        from IPython.display import clear_output
        clear_output()


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
    with _replacing(path) as temporary, open(temporary, "w", newline="\n") as file:
        for number, start in enumerate(progress(range(0, rows, chunk), desc="writing toy clicks")):
            rng = np.random.default_rng([seed, 2, number])
            dense, ranks = truth.draw(rng, chunk)
            probability = _sigmoid(truth.logit(dense, ranks))
            labels = rng.random(chunk) < probability
            keep = min(chunk, rows - start)
            codes = np.stack([truth.code(j, ranks[:, j]) for j in range(NUM_TABLES)], axis=1)
            file.writelines(_raw_line(*row) for row in zip(labels[:keep].tolist(), dense.tolist(), codes.tolist(),
                                                            (ranks < 0).tolist()))
            probabilities.append(probability[:keep])
    return np.concatenate(probabilities)


def _raw_line(label, dense, codes, missing):
    integers = ["" if x == MISSING else str(x) for x in dense]
    categories = ["" if gone else f"{code:08x}" for code, gone in zip(codes, missing)]
    return "\t".join([str(int(label)), *integers, *categories]) + "\n"


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
    of rows: blocks 1 to 6, and the first and second half of block 7.
    """

    def __init__(self, path, arrays):
        self.path = Path(path)
        self.labels, self.dense, self.sparse = arrays["labels"], arrays["dense"], arrays["sparse"]
        self._codes, self._code_offsets = arrays["codes"], arrays["code_offsets"]
        self._vocabularies = None
        self.table_sizes = (np.diff(self._code_offsets) + 1).tolist()
        self.block_offsets = _block_offsets(len(self.labels))
        start, end = self.block_offsets[6:]
        middle = (start + end + 1) // 2
        self.train, self.test, self.validation = range(0, start), range(start, middle), range(middle, end)

    def __len__(self):
        return len(self.labels)

    def __repr__(self):
        return f"CriteoData({self.path.name}: {len(self):,} rows, {sum(self.table_sizes):,} table rows)"

    @property
    def vocabularies(self):
        """One `Vocabulary` of integer codes a table; `ABSENT` stands for the empty field."""
        if self._vocabularies is None:
            bounds = itertools.pairwise(self._code_offsets.tolist())
            self._vocabularies = [Vocabulary(self._codes[start:end].tolist()) for start, end in bounds]
        return self._vocabularies

    def batch(self, rows):
        """A `Batch` of the rows given by a range, a slice or row numbers: log(1 + max(x, 0)), missing as 0."""
        if isinstance(rows, range):                            # a contiguous piece of the file is read as such
            rows = slice(rows.start, rows.stop, rows.step) if len(rows) and rows.step > 0 else np.array(rows, int)
        return _criteo_batch(self.dense[rows], self.sparse[rows], self.labels[rows])

    def encode(self, lines):
        """A `Batch` of raw Criteo lines (a list of texts, or one text), with or without the label column."""
        lines = lines.splitlines() if isinstance(lines, str) else list(lines)
        fields = {line.count("\t") + 1 for line in lines}
        labelled = fields != {len(COLUMNS) - 1}
        labels, dense, codes = _parse_lines(lines, "lines", 1, labelled)
        ids = np.stack([vocabulary.encode(codes[:, j]) for j, vocabulary in enumerate(self.vocabularies)], axis=1)
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


def preprocess_criteo(raw_data_file, processed_data_file, min_count=1, max_table_rows=None, progress=True):
    """Turn raw Criteo text into one processed file and open it.

    raw_data_file: tab-separated label, 13 integers, 26 categories of 8 hex digits; an empty field is missing.
    processed_data_file: an uncompressed .npz of labels, dense, sparse and vocabularies. One made before from the same
    rows and options is opened as it is; one made from others is refused.
    min_count, max_table_rows: categories seen less often, or beyond that many table rows, become id 0 (unknown).
    Vocabularies are counted on blocks 1 to 6 alone.
    Raises CriteoFormatError, naming file, line and column, for a malformed line, and for fewer than seven rows.
    """
    raw = Path(raw_data_file)
    if not raw.is_file():
        raise FileNotFoundError(f"there is no raw Criteo file {raw}; data/README.md says where to get one")
    source = dict(fingerprint=_fingerprint(raw), min_count=min_count, max_table_rows=max_table_rows)
    if Path(processed_data_file).exists():
        made_from = _open_processed(processed_data_file)["source"]
        if json.loads(str(made_from)) != source:
            raise ValueError(f"{processed_data_file} was made from another raw file or with other options than "
                             f"{source}; delete it, or give another processed_data_file")
        return load_criteo(processed_data_file)
    labels, dense, codes = _read_raw(raw, progress)
    train = slice(0, _block_offsets(len(labels))[6])
    sparse = np.empty(codes.shape, dtype=np.int32)
    kept_codes = []
    for j in range(NUM_TABLES):
        vocabulary = Vocabulary.fit(codes[train, j], min_count, max_table_rows)
        sparse[:, j] = vocabulary.encode(codes[:, j])
        kept_codes.append(np.array(vocabulary.values, dtype=np.int64))
    arrays = dict(labels=labels, dense=dense, sparse=sparse, codes=np.concatenate(kept_codes),
                  code_offsets=np.cumsum([0] + [len(kept) for kept in kept_codes]),
                  format=np.array(PROCESSED_FORMAT), source=np.array(json.dumps(source)))
    with _replacing(processed_data_file) as temporary:
        _write_npz(temporary, arrays)
    return load_criteo(processed_data_file)


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


def _read_raw(path, progress_bar, piece=4_000_000):
    """labels (N,), dense (N, 13), codes (N, 26) of a raw file, read in pieces of 4 MB."""
    parsed, line_number = [], 1
    with open(path, encoding="ascii", errors="replace", newline="\n") as file:
        pieces = iter(lambda: file.readlines(piece), [])
        total = -(-path.stat().st_size // piece)
        for lines in progress(pieces, desc=f"reading {path.name}", total=total, disable=not progress_bar):
            parsed.append(_parse_lines(lines, path, line_number))
            line_number += len(lines)
    if line_number <= 7:
        raise CriteoFormatError(f"{path} has {line_number - 1} rows; the seven blocks need at least one row each")
    return tuple(np.concatenate(parts) for parts in zip(*parsed))


def _parse_lines(lines, path, first_line, labelled=True):
    """labels (n,) uint8, dense (n, 13) int32 and codes (n, 26) int64 of raw lines, every field checked."""
    columns = COLUMNS if labelled else COLUMNS[1:]
    labels = np.zeros(len(lines), dtype=np.uint8)
    dense = np.empty((len(lines), NUM_DENSE), dtype=np.int32)
    codes = np.empty((len(lines), NUM_TABLES), dtype=np.int64)
    for n, line in enumerate(lines):
        fields = line.rstrip("\r\n").split("\t")
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
    if not (digits.isascii() and digits.isdigit()) or not MISSING < int(field) < 2 ** 31:
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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(name + ".npy")
            local_header = 30 + len(member.filename) + 20 + 4              # fixed part, name, zip64 sizes, padding tag
            padding = -(archive.fp.tell() + local_header) % 64
            member.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


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
    """The most memory this process has held, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    except (OSError, ValueError) as error:
        sys.exit(f"dlrm_utils.py {options.command}: {error}")
    seconds, memory = time.perf_counter() - start, peak_memory()
    print(f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} rows/s"
          + (f", peak memory {memory / 1e9:.2f} GB" if memory else ""))


if __name__ == "__main__":
    main()
