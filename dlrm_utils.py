"""The companion of DLRM.ipynb: it turns tables of ids and numbers into model input.

    python dlrm_utils.py preprocess data/toy.txt data/toy

Shapes: B rows in a batch, N rows in a file, nnz ids in a batch (all bags together).
"""

import argparse
import ast
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tarfile
import time
import types
import warnings
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

# A model without dense numbers has layers without inputs; PyTorch warns of each, needlessly.
warnings.filterwarnings("ignore", message="Initializing zero-element tensors")

# ---- Sparse-offset converters --------------------------------------------------------------------
# EmbeddingBag's convention: bag b is indices[offsets[b]:offsets[b + 1]]; the last runs to the end.


def to_offsets(bags):
    """Lay ragged bags of ids flat: (indices, offsets), int64 tensors of shape (nnz,) and (B,).

    bags: a sequence of sequences of ints, an array of equal rows, or a pandas Series of lists.
    ValueError, naming the bag, for an id that is no whole number from 0 to 2**63 - 1.
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
        raise ValueError(f"lengths[{lengths.argmin()}] is {lengths.min()}; a bag has 0 or more ids")
    return lengths.cumsum(0) - lengths


# Offsets with the closing offset nnz appended, (B + 1,), or ValueError.
def _closed(offsets, nnz):
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
    vector = torch.as_tensor(values)
    wrong_type = vector.is_floating_point() or vector.dtype == torch.bool
    if vector.ndim != 1 or (wrong_type and len(vector)):
        raise ValueError(f"{name} must be one row of integers, not {vector.dtype}, {vector.shape}")
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
        ids, starts = ([t.to(device) for t in part] for part in (self.indices, self.offsets))
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.dense.to(device), ids, starts, labels)

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
    """A `Batch` whose bags hold one id each, from dense (B, n_dense), ids (B,) a table, labels."""
    indices = [torch.tensor(np.asarray(column), dtype=torch.int64) for column in ids]
    offsets = [torch.arange(len(dense))] * len(indices)
    labels = None if labels is None else torch.tensor(np.asarray(labels), dtype=torch.float32)
    return Batch(torch.tensor(np.asarray(dense), dtype=torch.float32), indices, offsets, labels)


def progress(items, **options):
    """Yield the items under tqdm's bar, which leaves nothing behind, here or in a notebook."""
    in_notebook = "ipykernel" in sys.modules
    stream = sys.stdout if in_notebook else sys.stderr
    yield from tqdm(items, file=stream, leave=False, delay=0.5, **options)
    if in_notebook:
        from IPython.display import clear_output

        clear_output()


# Yield function(item) for each item in order, computed in threads, a few items ahead.
def _in_order(function, items, threads):
    pending = []
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.pop(0).result()
        yield from (future.result() for future in pending)


# Write to a temporary name beside path; whole and on the disk, it takes path's place.
@contextlib.contextmanager
def _replacing(path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Wait until the disk holds a file, or a folder's names: then a power cut loses nothing.
def _flush(path):
    if os.name != "nt":  # Windows has no such call for what is open for reading
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---- Vocabulary ----------------------------------------------------------------------------------


class Vocabulary:
    """Which value has which row of an embedding table.

    Id 0 is for values not seen in `fit`; the more frequent a value, the smaller its id, ties by
    first sight. A missing value (None, NaN, NaT, pd.NA) is a value of its own: None.
    """

    UNKNOWN = "<unknown>"

    def __init__(self, values):
        self.values = list(values)  # of ids 1, 2, 3, ...
        self._ids = {value: i for i, value in enumerate(self.values, start=1)}

    @classmethod
    def fit(cls, values, min_count=1, max_size=None):
        """Number the values seen min_count times or more, in at most max_size table rows."""
        counts = _objects(values).value_counts(dropna=False)  # falling, ties by first sight
        kept = counts.index[counts >= min_count].tolist()
        return cls(kept if max_size is None else kept[: max(max_size - 1, 0)])  # id 0 has a row

    def __len__(self):
        return len(self.values) + 1

    def encode(self, values):
        """Ids of values, int64 of shape (len(values),); 0 where a value is unknown."""
        return np.array([self._ids.get(value, 0) for value in _objects(values)], dtype=np.int64)

    def decode(self, ids):
        """The values of ids: a list; None for the missing value, `Vocabulary.UNKNOWN` for id 0."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(f"this vocabulary has ids 0 to {len(self) - 1}, not all of {ids}")
        return [self.values[i - 1] if i else self.UNKNOWN for i in ids.tolist()]


def _objects(values):
    values = pd.Series(list(values), dtype=object)
    return values.where(values.notna(), None)


# ---- A DataFrame of one's own --------------------------------------------------------------------


class FrameEncoder:
    """Turns a DataFrame into a `Batch`; a column that does not fit is named in a ValueError.

    dense: numeric columns, scaled to mean 0 and standard deviation 1 in `fit`; missing as 0.
    categorical: one value a row. multi_hot: a list of values a row, a missing one an empty bag.
    label: a column of 0 and 1, put into `Batch.labels` where the frame has it.
    """

    def __init__(self, dense=(), categorical=(), multi_hot=(), label=None):
        self.dense, self.categorical, self.multi_hot = [*dense], [*categorical], [*multi_hot]
        self.label, self.scales, self.vocabularies = label, None, {}  # scales: mean and deviation

    def fit(self, frame):
        """Learn scales and vocabularies from the training rows alone. Returns self."""
        self.scales = {}
        for column in self.dense:
            numbers = _numbers(frame, column)
            mean, deviation = np.nan_to_num([numbers.mean(), numbers.std(ddof=0)])
            self.scales[column] = [mean, deviation or 1.0]
        for column in self.categorical + self.multi_hot:
            values, _ = self._bags(frame, column)
            self.vocabularies[column] = Vocabulary.fit(values)
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
        for k, (column, (mean, deviation)) in enumerate(self.scales.items()):
            dense[:, k] = ((_numbers(frame, column) - mean) / deviation).fillna(0)
        for column, vocabulary in self.vocabularies.items():
            values, lengths = self._bags(frame, column)
            indices.append(torch.from_numpy(vocabulary.encode(values)))
            offsets.append(lengths_to_offsets(lengths))
        labels = self._labels(frame) if self.label in frame else None
        return Batch(torch.from_numpy(dense), indices, offsets, labels)

    def _bags(self, frame, column):  # all values, one after the other, and how many each row has
        values = _column(frame, column)
        if column in self.categorical:
            return values, np.ones(len(values), dtype=np.int64)
        lists = [[] if np.ndim(v) == 0 and pd.isna(v) else v for v in values]
        _refuse(values[[not pd.api.types.is_list_like(v) for v in lists]], "not a list of values")
        return list(itertools.chain.from_iterable(lists)), [len(bag) for bag in lists]

    def _labels(self, frame):
        labels = _numbers(frame, self.label)
        _refuse(frame[self.label][~labels.isin([0, 1])], "neither 0 nor 1")
        return torch.tensor(labels.to_numpy(), dtype=torch.float32)

    def _require_fit(self):
        if self.scales is None:
            raise ValueError("this FrameEncoder has seen no frame; call fit(frame) first")

    def save(self, path):
        """Write all that transform needs as JSON; ValueError for values that JSON cannot hold."""
        values = {column: vocabulary.values for column, vocabulary in self.vocabularies.items()}
        try:  # np.generic.item: NumPy's numbers as Python's
            text = json.dumps(vars(self) | {"vocabularies": values}, default=np.generic.item)
        except TypeError as error:
            raise ValueError(f"only texts and numbers can be saved ({error})") from error
        with _replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        encoder = cls()
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            vars(encoder).update({name: content[name] for name in vars(encoder)})
            encoder.vocabularies = {c: Vocabulary(v) for c, v in content["vocabularies"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file that FrameEncoder.save wrote") from error
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


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def load_notebook(path="DLRM.ipynb"):
    """A namespace of the notebook's imports, functions, classes, and of the cells tagged `example`.

    Nothing else of it runs. A relative path starts at this file. What an absent package would
    define is left out.
    """
    path = Path(__file__).resolve().parent / path
    namespace, ignored = {"__name__": path.name}, [ModuleNotFoundError]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        kinds = ast.stmt if "example" in cell["metadata"].get("tags", []) else DEFINITIONS
        body = ast.parse("".join(cell["source"])).body if cell["cell_type"] == "code" else []
        for statement in (statement for statement in body if isinstance(statement, kinds)):
            code = compile(ast.Module([statement], []), path.name, "exec")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, namespace)
            except tuple(ignored):
                ignored.append(NameError)  # of what needs the absent package
    return types.SimpleNamespace(**namespace)


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
