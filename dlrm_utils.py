"""The companion of DLRM.ipynb: it turns tables of ids and numbers into model input.

    python dlrm_utils.py preprocess data/toy.txt data/toy

What reads and encodes lies in `data/`, without PyTorch; here rows become tensors.
Shapes: B rows in a batch, N rows in a file, nnz ids in a batch (all bags together).
"""

import argparse
import collections
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import torch

from data import criteo, folder, tables
from data.criteo import CATEGORIES, COLUMNS, CRITEO_KAGGLE_TABLE_SIZES, INTEGERS
from data.encoder import Arrays, Encoder, Vocabulary
from data.files import MISSING, FormatError, hash_of, progress

__all__ = ["CRITEO_KAGGLE_TABLE_SIZES", "MISSING", "Vocabulary"]  # for the notebook
CriteoFormatError = FormatError

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


def offsets_to_lengths(offsets, nnz, name="offsets"):
    """Bag lengths (B,), as TorchRec counts, from offsets (B,) and the number of ids."""
    closed = torch.cat([_int64_vector(offsets, name).cpu(), torch.tensor([nnz])])
    lengths = closed.diff()
    if closed[0] != 0:
        raise ValueError(f"{name} start at {closed[0]}; the first bag starts at 0")
    if (lengths < 0).any():
        b = lengths.argmin()
        end = f"the next, or the end of the indices, is {closed[b + 1]}"
        raise ValueError(f"{name}[{b}] is {closed[b]}, but {end}; offsets never fall")
    return lengths


def lengths_to_offsets(lengths):
    """Offsets (B,) from bag lengths (B,): offsets[b] is the number of ids before bag b."""
    lengths = _int64_vector(lengths, "lengths")
    if (lengths < 0).any():
        raise ValueError(f"lengths[{lengths.argmin()}] is {lengths.min()}; a bag has 0 or more ids")
    return lengths.cumsum(0) - lengths


def _int64_vector(values, name):
    """One row of integers as an int64 tensor; ValueError, with the name, for anything else."""
    is_tensor = isinstance(values, torch.Tensor)
    values = values if is_tensor else np.asarray(values)
    if values.ndim != 1 or (len(values) and "int" not in str(values.dtype)):
        found = f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(f"{name} must be one row of integers, not {found}")
    vector = values.long() if is_tensor else torch.from_numpy(values.astype(np.int64))
    if "uint64" in str(values.dtype) and (vector < 0).any():
        raise ValueError(f"{name} hold a number beyond 2**63 - 1")
    return vector


def _places(shifts, lengths):
    """Where the ids of bags lie that were shifted: place k of a bag stays place k of it."""
    shift = torch.repeat_interleave(shifts, lengths)
    return shift + torch.arange(len(shift), device=shift.device)


# ---- Batches -------------------------------------------------------------------------------------


class Batch(collections.namedtuple("Batch", ["dense", "indices", "offsets", "labels"])):
    """Model input for B rows, a named tuple; ValueError if its parts do not fit together.

    dense (B, n_dense) float32; indices: the ids of each table, int64 (nnz,); offsets: where each
    row's bag starts among them, int64 (B,) a table; labels (B,) float32, or None. Offsets that
    fall, start late or end beyond the ids would let PyTorch read foreign memory: they are refused.
    What this module makes itself goes through `Batch._make`, which looks at nothing.
    """

    def __new__(cls, dense, indices, offsets, labels=None):
        if len(indices) != len(offsets):
            raise ValueError(f"{len(indices)} tables have ids, but {len(offsets)} have offsets")
        rows = {f"table {t}": starts for t, starts in enumerate(offsets)} | {"labels": labels}
        for name, part in rows.items():
            if part is not None and len(part) != len(dense):
                raise ValueError(f"{name} has {len(part)} rows, but dense has {len(dense)}")
        for t, (ids, starts) in enumerate(zip(indices, offsets)):
            for name, vector in (("ids", ids), ("offsets", starts)):
                kind = getattr(vector, "dtype", type(vector).__name__)
                if kind not in (torch.int64, torch.int32) or vector.ndim != 1:
                    found = f"{kind} of shape {np.shape(vector)}"
                    raise ValueError(f"table {t}: its {name} are {found}, not one tensor of int64")
        if len(indices):
            _check_bags(list(indices), list(offsets))
        return super().__new__(cls, dense, indices, offsets, labels)

    def to(self, device):
        """The same batch on another device."""
        ids, starts = ([t.to(device) for t in part] for part in (self.indices, self.offsets))
        labels = None if self.labels is None else self.labels.to(device)
        return Batch._make((self.dense.to(device), ids, starts, labels))

    def take(self, rows):
        """The batch of some rows, in that order; `rows` are an index as NumPy reads it."""
        total = len(self.dense)
        rows = torch.from_numpy(row_numbers(rows, total)).to(self.dense.device)
        following = (rows + 1).clamp(max=total - 1)
        indices, offsets = [], []
        for ids, starts in zip(self.indices, self.offsets, strict=True):
            lengths = torch.where(rows + 1 < total, starts[following], len(ids)) - starts[rows]
            offsets.append(lengths_to_offsets(lengths))
            indices.append(ids[_places(starts[rows] - offsets[-1], lengths)])
        labels = None if self.labels is None else self.labels[rows]
        return Batch._make((self.dense[rows], indices, offsets, labels))

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


def row_numbers(rows, total):
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
    labels = None if labels is None else torch.tensor(np.asarray(labels), dtype=torch.float32)
    ids = [_int64_vector(column, f"the ids of table {t}") for t, column in enumerate(ids)]
    starts = torch.arange(max(map(len, ids), default=0))
    return Batch(dense, ids, [starts[: len(column)] for column in ids], labels)


def _check_bags(indices, offsets):
    """ValueError for bounds and ids that cannot be; all tables together, ten times as fast."""
    ends = torch.tensor([[len(ids)] for ids in indices], device=offsets[0].device)
    bounds = torch.cat([torch.stack(offsets), ends], dim=1)  # (T, B + 1)
    wrong = (bounds[:, 0] != 0) | (bounds.diff(dim=1) < 0).any(dim=1)
    if wrong.any():
        t = wrong.nonzero()[0].item()
        offsets_to_lengths(offsets[t], len(indices[t]), f"table {t}: its offsets")  # says how
    if (torch.cat(indices) < 0).any():
        t, ids = next((t, ids) for t, ids in enumerate(indices) if (ids < 0).any())
        raise ValueError(f"table {t} has the id {ids.min()}; ids are 0 to 2**63 - 1")


# ---- Rows of a table -----------------------------------------------------------------------------


class FrameEncoder(Encoder):
    """An `Encoder` whose rows become a `Batch`: the one that the notebook and folders use.

    Where its columns are Criteo's, it takes raw lines and files of them as well.
    """

    def transform(self, rows):
        """A `Batch` of rows in order: a frame, a LazyFrame, a dict, one row, or raw lines."""
        return _laid(self.arrays(rows))

    encode = transform

    def batches(self, rows, label="welcome"):
        """A `Batch` for each piece of the rows, a `pathlib.Path` among them; see `pieces`."""
        return map(_laid, self.pieces(rows, label))

    def pieces(self, rows, label="welcome"):
        """The `Arrays` of a piece of the rows at a time; label: as `columns` has it."""
        self._require_fit()
        lines, labelled = self._lines(rows)
        if not lines or len(lines) > 64:
            yield from super().pieces(rows, label)
            return
        read = [criteo.read_line(x, f"lines, line {n}", labelled) for n, x in enumerate(lines, 1)]
        labels, numbers, names = zip(*read)
        wanted = labelled and self.label is not None and label != "unread"
        labels = np.array(labels, dtype=np.float32) if wanted else None
        ids = [self.vocabulary(table).encode(n) for table, n in zip(CATEGORIES, zip(*names))]
        numbers = self.scaled(np.array(numbers, dtype=np.float64))
        yield Arrays(numbers, ids, [None] * len(ids), labels)

    def sources(self, rows, columns):
        """The `tables.Source`s of rows: what `data.tables` takes, Criteo's files, or raw lines."""
        lines, labelled = self._lines(rows)
        if lines is not None:
            text = "".join(f"{line}\n" for line in lines).encode()
            rows = criteo.parsed(text, "lines", 1, labelled)
            rows = rows.rename({"label": str(self.label)}, strict=False)
        if lines is not None or not self._is_criteo():
            return super().sources(rows, columns)
        found, listed = [], isinstance(rows, list | tuple)
        for each in rows if listed and all(isinstance(p, Path) for p in rows) else [rows]:
            if isinstance(each, Path) and not criteo.is_table(each):
                found.append(_text_source(each, columns))
            else:
                found += [_Tidied(*s) for s in tables.sources(each, columns, any_capitals=True)]
        return found

    def _is_criteo(self):
        return self.numeric == INTEGERS and self.categorical == self.tables == CATEGORIES

    def _lines(self, rows):
        """(raw lines, do they have a label?) of one or several texts; (None, None) of others."""
        texts = [rows] if isinstance(rows, str | bytes) else rows
        found = isinstance(texts, list | tuple) and all(isinstance(x, str | bytes) for x in texts)
        if found and not self._is_criteo() and any("\t" in str(text) for text in texts):
            raise ValueError("raw lines have Criteo's columns; give this encoder a frame")
        if not (found and self._is_criteo()):
            return None, None
        if {*self.kinds.values()} - {"text", None}:
            raise ValueError("raw lines hold texts, but this encoder was fitted on other names")
        texts = [x.decode("ascii", "replace") if isinstance(x, bytes) else x for x in texts]
        lines = [line for text in texts for line in text.removesuffix("\n").split("\n")]
        return lines, not lines or lines[0].count("\t") != len(COLUMNS) - 2


def _text_source(path, columns):
    """The source of a file that `data.criteo` reads, whatever the label is called."""
    labelled = criteo.is_labelled(path)
    names = [c.name if c.name in COLUMNS or c.name is None else "label" for c in columns]
    places = {str(k): name for k, name in enumerate(names) if name in COLUMNS[not labelled :]}
    empty = pl.DataFrame(schema=dict.fromkeys(places, pl.String))

    def read():
        return (frame.select(**places) for frame in criteo.frames(path, labelled))

    return tables.Source(path, empty, read, typed=False)


class _Tidied(tables.Source):
    """A table whose categories are in small letters, as in Criteo's text."""

    def pieces(self, columns):
        return criteo.tidy(super().pieces(columns))


def _laid(arrays):
    """A `Batch` of plain arrays; they are sound by construction, and not looked at again."""
    numbers, ids, lengths, labels = arrays
    starts = torch.arange(len(numbers))
    offsets = [starts if each is None else lengths_to_offsets(each) for each in lengths]
    labels = None if labels is None else torch.from_numpy(labels)
    return Batch._make((torch.from_numpy(numbers), [*map(torch.from_numpy, ids)], offsets, labels))


# ---- A folder of arrays: any table larger than memory --------------------------------------------

REMAKE = "python dlrm_utils.py preprocess RAW FOLDER"
RUN, RUNS_AT_ONCE = 1024, 256  # neighbouring rows, and how many such runs are mixed


def preprocess_table(
    table, processed_folder, dense=(), categorical=(), label=None, min_count=1,
    max_table_rows=None, progress=True, counts=(), multi_hot=(), encoder=None,
):  # fmt: skip
    """Turn any table into a folder of arrays, with bounded memory, and open it as `CriteoData`.

    table: what a `FrameEncoder` takes; or a path or several, .parquet or .csv with a header. A
    LazyFrame must give its rows in the same order each time: it is read twice, and again later.
    The names and options are those of `FrameEncoder`, or an `encoder` stands for all of them: one
    that is not fitted yet is fitted on the training rows, a fitted one used as it stands. Of one
    table the first six sevenths are training rows, of several files all but the last.
    processed_folder: opened if made before from the same rows by the same options, else refused.
    A run that was stopped goes on from processed_folder + ".making".
    """
    options = (dense, categorical, multi_hot, label, min_count, counts, max_table_rows)
    if encoder is None:
        encoder = FrameEncoder(*options)
    elif any(given not in ((), [], None, 1) for given in options):
        raise ValueError("the encoder has its own names and options; give it, or them")
    table = [table] if isinstance(table, str | Path) else table
    if isinstance(table, list | tuple):  # where texts could be lines
        table = [Path(each) if isinstance(each, str) else each for each in table]
    columns = encoder.columns()
    found = encoder.sources(table, columns)
    columns = tables.agreed(columns, found)
    asked = folder.make(found, columns, processed_folder, encoder, progress)
    data = load_criteo(processed_folder)
    if data.source != asked:
        made = f"{processed_folder} was made from {data.source}"
        raise ValueError(f"{made}, not {asked}; name another folder")
    fitted = data.encoder
    encoder.set_fitted(fitted.kinds, fitted.scales, fitted.about, data.path / "encoder")
    return data


def preprocess_criteo(
    raw_data_file, processed_folder, min_count=1, max_table_rows=None, progress=True
):
    """Turn Criteo rows, a path or several in order, into a folder of arrays and open it.

    raw_data_file: lines as `data.criteo` reads them, plain, .gz, or train.txt in a .tar.gz; or a
    .csv or .parquet with columns label, I1 to I13, C1 to C26, in any capitals. The rest is as in
    `preprocess_table`. FormatError, naming file, line and column, for a malformed line.
    """
    encoder = FrameEncoder([], CATEGORIES, [], "label", min_count, INTEGERS, max_table_rows)
    several = isinstance(raw_data_file, list | tuple) and len(raw_data_file) > 1
    for path in raw_data_file if several else ():
        if not criteo.is_table(path):
            criteo.check_end(path)  # before hours of work on the others
    return preprocess_table(raw_data_file, processed_folder, encoder=encoder, progress=progress)


def load_criteo(processed_folder):
    """Open a processed folder, whatever its size, in milliseconds, or raise FormatError."""
    path = Path(processed_folder)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}; run {REMAKE}")
    if not path.is_dir():
        raise FormatError(f"{path} is a file, not a processed folder; {REMAKE} makes one")
    try:
        return CriteoData(path)
    except (ValueError, FileNotFoundError) as error:  # no other error tells of what it holds
        found = f"{path} is not a whole processed folder of this version ({error})"
        raise FormatError(f"{found}; make one at another place: {REMAKE}") from error


class CriteoData:
    """Rows on disk, in the raw file's order; nothing is read before it is asked for.

    labels (N,) uint8, None without a label; dense (N, numbers) int32 as read, `MISSING` where
    empty, or float64 and NaN where there are fractions; sparse (N, categories) int32 ids; bags: of
    each multi-hot column its ids (nnz,) int32 and its closed offsets (N + 1,) int64.
    table_sizes: an int a table. train, test, validation: ranges of rows, of one file blocks 1 to 6,
    the first and the second half of block 7. block_offsets: the 8 bounds of the blocks. source:
    what it was made from. encoder: the `FrameEncoder` that turns rows into a `Batch`.
    """

    def __init__(self, path):
        self.path = Path(path)
        about, arrays = folder.opened(self.path)
        self.source, self.rows = about["source"], about["rows"]
        self.encoder = FrameEncoder.load(self.path / "encoder")
        self.table_sizes, self.encode = self.encoder.table_sizes, self.encoder.encode
        self.labels, self.dense, self.sparse = map(arrays.get, ("labels", "dense", "sparse"))
        bags = map(self.encoder.place, self.encoder.multi_hot)
        self.bags = [(arrays[f"bags-{k}"], arrays[f"offsets-{k}"]) for k in bags]
        self.block_offsets = [*folder.bounds(about["train_rows"], 6), self.rows]
        first, last = self.block_offsets[6:]
        middle = (first + last + 1) // 2
        self.train, self.test = range(first), range(first, middle)
        self.validation = range(middle, last)

    def __len__(self):
        return self.rows

    def __reduce__(self):  # a worker process opens the folder again, it is sent no arrays
        return load_criteo, (self.path.absolute(),)

    def fingerprint(self):
        """A hash of rows, options and vocabularies: a training goes on with the same one alone."""
        return hash_of([self.source, self.encoder.fingerprint()])

    def batch(self, rows):
        """A `Batch` of rows (a range, a slice, numbers, a mask) ready for the model."""
        rows = row_numbers(rows, len(self))
        numbers = self.encoder.scaled(self.dense[rows])
        ids, lengths = list(self.sparse[rows].T.astype(np.int64)), [None] * self.sparse.shape[1]
        for values, offsets in self.bags:
            starts = torch.from_numpy(offsets[rows])
            lengths.append(torch.from_numpy(offsets[rows + 1]) - starts)
            places = _places(starts - lengths_to_offsets(lengths[-1]), lengths[-1])
            ids.append(values[places.numpy()].astype(np.int64))
        labels = None if self.labels is None else self.labels[rows].astype(np.float32)
        return _laid(Arrays(numbers, ids, lengths, labels))

    def read_ahead(self, rows):
        """Read whole runs of rows once, so that the system holds their pages.

        The memory map alone would fetch them one by one, ten times as slow from a cold disk.
        """
        runs = np.unique(row_numbers(rows, len(self)) // RUN) * RUN
        ends = np.minimum(runs + RUN, len(self))
        arrays = [self.labels, self.dense, self.sparse, *(offsets for _, offsets in self.bags)]
        ranges = [(array, runs, ends) for array in arrays if array is not None]
        ranges += [(values, offsets[runs], offsets[ends]) for values, offsets in self.bags]
        for array, starts, stops in ranges:
            size = array.strides[0]
            with open(array.filename, "rb", buffering=0) as file:  # past the memory map
                for start, stop in zip(starts.tolist(), stops.tolist()):
                    file.seek(array.offset + start * size)
                    file.read((stop - start) * size)


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


# ---- The command ---------------------------------------------------------------------------------


def main(arguments=None):
    """The command `preprocess`; an error is one line, and the exit code not 0."""
    parser = argparse.ArgumentParser(description="Tables for DLRM.ipynb")
    parser.add_argument("command", choices=["preprocess"], help="Criteo rows to a folder of arrays")
    parser.add_argument("raw", metavar="RAW", nargs="+", help="text, .gz, .tar.gz, .csv, .parquet")
    parser.add_argument("processed", metavar="PROCESSED")
    parser.add_argument("--min-count", type=int, default=1, help="rarer categories become id 0")
    parser.add_argument("--max-table-rows", type=int, help="at most this many rows a table")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["predict"]:
        parser.error("it has moved: python dlrm_models.py predict MODEL IN OUT")
    o, start = parser.parse_args(arguments), time.perf_counter()
    there = (Path(o.processed) / "source.json").exists()
    try:
        rows = len(preprocess_criteo(o.raw, o.processed, o.min_count, o.max_table_rows))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"dlrm_utils.py preprocess: {error}")
    seconds = time.perf_counter() - start
    speed = "made before, opened" if there else f"{rows / seconds:,.0f} rows/s"
    print(f"{rows:,} rows in {seconds:.1f} s, {speed}")


if __name__ == "__main__":
    main()
