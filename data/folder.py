"""A table larger than memory becomes a folder of arrays, in three stages; a stopped run goes on.

Stage 1 reads each file once, in parts: numbers as they are, names as places in a small dictionary
of the part. Stage 2 merges a table's dictionaries: it costs what the names cost, not the rows.
Stage 3 turns places into ids and writes the arrays, row by row.
"""

import contextlib
import copy
import errno
import glob
import hashlib
import os
import re
import shutil
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from data import encoder as names_of
from data import files
from data.files import MISSING, FormatError, flush, in_order, progress
from data.tables import Piece

VERSION = "data.folder 5"
STAGE_VERSION = "data.folder stages 1"  # stages of another form are not gone on from
LOCK, STAGES = "dlrm_utils.lock", "dlrm_utils.stages"  # all that we write in FOLDER.making
MERGE_MEMORY = 320 << 20  # bytes of a table's dictionaries that are merged in memory
ENTRY = 40  # bytes of one of their entries, besides its name, while it is merged
# DuckDB merges more than that; what its memory cannot hold, of which each thread needs a share,
# goes to the disk.
ENGINE = {"memory_limit": "500MB", "threads": min(os.cpu_count() or 1, 8)}
WHOLE_HASH = 64 << 20  # a larger file is hashed in pieces


# ---- The whole job -------------------------------------------------------------------------------


def file_fingerprint(path):
    """A hash of a file up to `WHOLE_HASH` bytes. Of a larger one: size, time of change and 256
    pieces, so that an edit which keeps the size, sets the time back and misses the pieces is not
    noticed."""
    size, digest = path.stat().st_size, hashlib.sha256()
    starts, length = [0], size
    if size > WHOLE_HASH:
        digest.update(str(path.stat().st_mtime_ns).encode())
        starts, length = [(size - 4096) * k // 255 for k in range(256)], 4096
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(length))
    return f"{size} bytes {digest.hexdigest()[:16]}"


def rows_fingerprint(source, columns):
    """A hash of a table's rows and their order, found by reading it once."""
    rows, found = 0, 0
    for piece in source.pieces(columns):
        row = pl.int_range(rows, rows + pl.len()).alias("row")
        found ^= piece.frame.select(pl.struct(pl.all(), row).hash().bitwise_xor()).item() or 0
        rows += len(piece.frame)
    return f"{rows} rows {found:016x}"


def make(sources, columns, folder, encoder, show=True):
    """Make a folder of `data.tables.Source`s unless it is there; a dict of what it was asked for.

    An encoder that is not fitted is fitted on the training rows: of one source the first six
    sevenths, of several all but the last. columns: its own, with kinds that all sources agree on.
    """
    folder = Path(os.path.realpath(folder))
    if folder.is_mount() or Path.cwd().is_relative_to(folder):  # it could not take its place
        raise FormatError(f"{folder} is a disk, or holds this run; name a new folder in it")
    asked = {"files": []}
    for source in sources:
        of_file = isinstance(source.place, Path)
        found = file_fingerprint(source.place) if of_file else rows_fingerprint(source, columns)
        asked["files"].append(found)
    if encoder.scales is None:
        options = {name: getattr(encoder, name) for name in names_of.OPTIONS}
        options["kinds"] = [list(pair) for pair in encoder.kinds.items()]
        asked |= {name: option for name, option in options.items() if option not in (None, [])}
    else:
        asked["encoder"] = encoder.fingerprint()
    work = folder.with_name(f"{folder.name}.making")
    if work.exists() or not _in_use(folder):
        with _alone(work, folder):
            if not _in_use(folder):  # another process may just have made it
                stages = work / STAGES / files.hash_of([VERSION, STAGE_VERSION, asked])
                _run(sources, columns, folder, stages, copy.copy(encoder), asked, show)
    return asked


def _in_use(path):
    return path.is_file() or (path.exists() and any(path.iterdir()))


@contextlib.contextmanager
def _alone(work, folder):
    """Hold the lock in `work`; afterwards our stages go, unless they are worth going on from."""
    with contextlib.ExitStack() as held:
        while True:
            with contextlib.suppress(FileNotFoundError):  # who held it has just removed it all
                found = [path.name for path in work.iterdir()] if work.is_dir() else []
                if work.is_file() or {*found} - {LOCK, STAGES}:
                    raise FormatError(f"{work} is in the way; move it, or name another folder")
                work.mkdir(parents=True, exist_ok=True)
                held.enter_context(files.waiting_lock(work / LOCK, f"it makes {folder}"))
                break
        try:
            yield
        except FormatError:  # what was read of these rows is of no use
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


def _run(sources, columns, folder, stages, encoder, asked, show):
    """Do what the stages lack, and put the whole folder at its place."""
    of_source, data = [], stages / "data"
    for left in [*data.rglob(".*")]:  # what a killed run was just writing
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    for k, source in enumerate(sources):
        done = stages / "parts" / f"{k:06}"
        if not done.exists():
            bar = {"desc": f"reading {k + 1} of {len(sources)}", "disable": not show}
            _store(encoder, progress(source.pieces(columns), **bar), done)
        of_source.append([Part(path) for path in sorted(done.iterdir())])
        rows = sum(part.rows for part in of_source[-1])
        if rows < (7 if len(sources) == 1 else 1):
            needs = "one table needs 7, each of several one"
            raise FormatError(f"{source.place} has {rows} rows; {needs}")
    parts = [part for of_one in of_source for part in of_one]
    total = sum(part.rows for part in parts)
    train_rows = bounds(total, 7)[6] if len(sources) == 1 else total - rows
    names = _number(stages, parts, encoder, train_rows, show)
    arrays = _write_arrays(stages, parts, encoder, show)
    if encoder.scales is None:
        kinds = {column.name: column.kind for column in columns if not column.measure}
        scales = _scales(np.load(data / "dense.npy", mmap_mode="r")[:train_rows], encoder)
        encoder.set_fitted(kinds, scales, names, data / "encoder").write_settings(data / "encoder")
        _check_scaled(sources, columns, of_source, encoder)
    else:
        encoder.save(data / "encoder")
    about = {"source": asked, "rows": total, "train_rows": train_rows, "arrays": arrays}
    files.write_json(data / "source.json", VERSION, about)
    for path in [*data.rglob("*"), data]:
        flush(path)
    if folder.exists():
        folder.rmdir()  # an empty one
    os.rename(data, folder)
    flush(folder.parent)


def _scales(dense, encoder):
    """Of each dense column what `scale` finds in the training rows."""
    return names_of.scale(dense[:, : len(encoder.dense)])


def _check_scaled(sources, columns, of_source, encoder):
    """FormatError, with file and row, for a number that leaves float32 once it is scaled."""
    for source, parts in zip(sources, of_source if encoder.dense else []):
        row = source.first_row
        for part in parts:
            encoder.scaled(part.numbers(encoder), Piece(None, columns, source.place, row))
            row += part.rows


def bounds(rows, blocks):
    """Bounds of equal blocks of rows, the first rows % blocks of them one row longer."""
    size, longer = divmod(rows, blocks)
    return [b * size + min(b, longer) for b in range(blocks + 1)]


def opened(folder):
    """(what `source.json` says, {name: memory map}) of a whole folder, or ValueError."""
    about, arrays = files.read_json(folder / "source.json", VERSION), {}
    for name, (dtype, shape) in about["arrays"].items():
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
        found = [arrays[name].dtype.str, list(arrays[name].shape)]
        if found != [dtype, shape]:
            raise ValueError(f"{name}.npy holds {found}, not {[dtype, shape]}")
    return about, arrays


# ---- Stage 1: rows to parts ----------------------------------------------------------------------


class Part:
    """A file of stage 1: lists by name, which can be read alone."""

    def __init__(self, path):
        self.path = path
        # Rows; are all numbers whole? Of each table: names, their bytes, and values of all rows.
        self.rows, self.whole, *sizes = self.read("about")[0].to_list()
        self.sizes, self.bytes, self.values = sizes[::3], sizes[1::3], sizes[2::3]

    def read(self, *names):
        """Some of its lists, a Series each."""
        with open(self.path, "rb") as file:  # a path would be taken as a pattern
            frame = pl.read_ipc(file, columns=list(names))
        return [frame[name][0] for name in names]

    def numbers(self, encoder):
        """Its rows' numbers as they are kept, (rows, numbers)."""
        return self.read("numbers")[0].to_numpy().reshape(self.rows, len(encoder.numeric))

    def dictionaries(self, tables, train_rows):
        """Of each table k its names, and how often each occurs in the first `train_rows` rows."""
        lists = self.read(*(f"{kind} {k}" for k in tables for kind in ("names", "counts")))
        for k, names, counts in zip(tables, lists[::2], lists[1::2]):
            if train_rows < self.rows:
                places, lengths = self.read(f"places {k}", f"lengths {k}")
                stop = lengths[: max(train_rows, 0)].sum() if len(lengths) else max(train_rows, 0)
                counts = _counts(places[:stop].to_numpy(), len(names))
            yield pl.DataFrame({"name": names_of.name_texts(names), "count": counts})


def _store(encoder, pieces, done):
    """Stage 1: a file for each piece of a source, in the folder `done`."""
    unfinished = done.parent.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)

    def store(numbered_piece):
        k, piece = numbered_piece
        lists = [pl.Series(name, [values]) for name, values in _lists(encoder, piece).items()]
        pl.DataFrame(lists).write_ipc(unfinished / f"{k:09}")
        flush(unfinished / f"{k:09}")

    for _ in in_order(store, enumerate(pieces), threads=2):
        pass
    flush(unfinished)
    done.parent.mkdir(exist_ok=True)
    os.rename(unfinished, done)
    flush(done.parent)


def _lists(encoder, piece):
    """What stage 1 keeps of a piece: labels, numbers row by row, and of each table its places,
    its names by first sight, how often each occurs, and the lengths of bags."""
    numbers, labels = encoder.numbers(piece), encoder.labels(piece)
    if encoder.scales is not None:
        encoder.scaled(numbers, piece)  # so that a number too large is found here, by its row
    missing = np.isnan(numbers)
    whole = bool((missing | ((numbers == np.rint(numbers)) & (np.abs(numbers) < 2**31))).all())
    if whole:
        numbers = np.where(missing, MISSING, numbers).astype(np.int32)
    about, lists = [len(piece.frame), whole], {"numbers": pl.Series(numbers.ravel())}
    if labels is not None:
        lists["labels"] = pl.Series(labels.astype(np.uint8))
    for k, name in enumerate(encoder.tables):
        values, lengths = encoder.bags(piece, name)
        places, names = names_of.distinct_of(values)
        places = places.astype(np.min_scalar_type(max(len(names) - 1, 0)))
        lists |= {f"places {k}": pl.Series(places), f"names {k}": names}
        lists[f"counts {k}"] = _counts(places, len(names))
        lists[f"lengths {k}"] = pl.Series([] if lengths is None else lengths, dtype=pl.Int64)
        about += [len(names), names.estimated_size() + ENTRY * len(names), len(values)]
    return lists | {"about": pl.Series(about, dtype=pl.Int64)}


def _counts(places, size):
    return pl.Series(np.bincount(places, minlength=size).astype(np.uint32))


# ---- Stage 2: one numbering of each table --------------------------------------------------------


def _number(stages, parts, encoder, train_rows, show):
    """The ids of each table's dictionaries, entry by entry, to the disk; what `write_names` says
    of its vocabulary. A fitted encoder has its own."""

    def number(k):
        name, about = encoder.tables[k], {}
        if encoder.scales is not None:
            encode = encoder.vocabulary(name).encode
            ids = np.concatenate([encode(part.read(f"names {k}")[0]) for part in parts])
        else:
            limits = encoder.min_count, encoder.max_table_rows
            size, spilled = sum(part.bytes[k] for part in parts), stages / "spilled" / str(k)
            found = small.get(k) or (one for [one] in _dictionaries(parts, [k], train_rows))
            kept, ids = merged(found, size, spilled, *limits)
            path = stages / "data" / "encoder" / encoder.file_of(name)
            with files.replacing(path) as temporary, open(temporary, "wb") as file:
                about = names_of.write_names(file, kept)
        with _writing(stages / "ids" / f"{k}.npy", "<i4", [len(ids)]) as write:
            write(ids)
        flush(stages / "ids" / f"{k}.npy")
        files.write_json(done[name], STAGE_VERSION, about)

    done = {name: stages / "ids" / f"{k}.json" for k, name in enumerate(encoder.tables)}
    todo = [k for k, path in enumerate(done.values()) if not path.exists()]
    small, share = {}, MERGE_MEMORY // max(len(todo), 1)
    few = [k for k in todo if sum(part.bytes[k] for part in parts) <= share]
    if few and encoder.scales is None:  # read together, which is sooner
        small = dict(zip(few, zip(*_dictionaries(parts, few, train_rows))))
    for _ in in_order(number, progress(todo, desc="numbering names", disable=not show), threads=2):
        pass
    return {name: files.read_json(path, STAGE_VERSION) for name, path in done.items()}


def _dictionaries(parts, tables, train_rows):
    """Part by part the dictionaries of tables, of whose names the training rows count."""
    for part in parts:
        yield part.dictionaries(tables, train_rows)
        train_rows -= part.rows


def merged(dictionaries, size, spilled, min_count=1, max_table_rows=None):
    """Number the names of dictionaries: (Series of the kept ones, by id; the ids of all entries).

    dictionaries: DataFrames of `name` and `count`, in the order of the rows; their entries, one
    after the other, get their name's id, or 0. size: their bytes; where these are more than
    `MERGE_MEMORY`, DuckDB merges them in the folder `spilled`.
    """
    if size > MERGE_MEMORY:
        return _merged_on_disk(dictionaries, spilled, min_count, max_table_rows)
    kept, ids = names_of.numbered(list(dictionaries), min_count, max_table_rows)
    return [kept], ids


MERGE = """CREATE TABLE known AS
SELECT name, sum(count) AS count, min(entry) AS first FROM entries GROUP BY name"""
NUMBER = """CREATE TABLE kept AS
SELECT name FROM known WHERE count >= $least ORDER BY count DESC, first LIMIT $most"""
LOOK_UP = """SELECT entry, kept.rowid + 1 AS id
FROM entries JOIN kept ON entries.name IS NOT DISTINCT FROM kept.name"""


def _merged_on_disk(dictionaries, spilled, min_count, max_table_rows):
    """`merged` by an engine that spills what memory cannot hold; the same names, the same ids."""
    shutil.rmtree(spilled, ignore_errors=True)  # of a run that was stopped
    spilled.mkdir(parents=True)
    size, paths = 0, []
    for frame in dictionaries:
        paths.append(spilled / f"{len(paths):09}")
        entries = pl.int_range(size, size + len(frame)).alias("entry")
        frame.with_columns(entries).write_parquet(paths[-1], compression_level=1)
        size += len(frame)
    ids = np.zeros(size, np.int32)
    with duckdb.connect(config=ENGINE | {"temp_directory": str(spilled / "engine")}) as engine:
        engine.read_parquet([glob.escape(str(path)) for path in paths]).create_view("entries")
        engine.execute(MERGE)
        most = 2**31 if max_table_rows is None else max_table_rows - 1  # id 0 has a row
        engine.execute(NUMBER, {"least": min_count, "most": most})
        engine.table("kept").write_parquet(str(spilled / "kept"))
        found = engine.execute(LOOK_UP)
        while len(chunk := found.fetch_df_chunk(64)):
            ids[chunk["entry"]] = chunk["id"]
    kept = pl.scan_parquet(spilled / "kept", glob=False)
    return (frame["name"] for frame in kept.collect_batches(chunk_size=1 << 20)), ids


# ---- Stage 3: arrays -----------------------------------------------------------------------------


def _write_arrays(stages, parts, encoder, show):
    """Labels, numbers, ids and bags, row by row; returns the type and shape of each array."""
    rows, whole = sum(part.rows for part in parts), all(part.whole for part in parts)
    tables, singles = range(len(encoder.tables)), len(encoder.categorical)
    arrays = {"dense": ["<i4" if whole else "<f8", [rows, len(encoder.numeric)]]}
    arrays["sparse"] = ["<i4", [rows, singles]]
    if encoder.label is not None:
        arrays["labels"] = ["|u1", [rows]]
    bags = {k: encoder.place(encoder.tables[k]) for k in tables[singles:]}
    for k, place in bags.items():
        arrays[f"bags-{place}"] = ["<i4", [sum(part.values[k] for part in parts)]]
        arrays[f"offsets-{place}"] = ["<i8", [rows + 1]]  # the last one closes
    ids = [np.load(stages / "ids" / f"{k}.npy", mmap_mode="r") for k in tables]
    starts = np.cumsum([[0] * len(tables), *(part.sizes for part in parts)], axis=0).tolist()
    ends = {f"offsets-{place}": 0 for place in bags.values()}

    def made(part_and_start):
        part, start = part_and_start
        numbers = part.numbers(encoder)
        columns = {"dense": numbers if whole else names_of.floats(numbers)}
        if encoder.label is not None:
            [columns["labels"]] = part.read("labels")
        placed = part.read(*(f"places {k}" for k in tables)) if tables else []
        own = [column[s : s + size] for column, s, size in zip(ids, start, part.sizes)]
        found = [names[places.to_numpy()] for names, places in zip(own, placed)]
        columns["sparse"] = np.array(found[:singles], np.int32).T
        for k, place in bags.items():
            columns[f"bags-{place}"] = found[k]
            [columns[f"offsets-{place}"]] = part.read(f"lengths {k}")
        return columns

    with contextlib.ExitStack() as stack:
        write = {
            name: stack.enter_context(_writing(stages / "data" / f"{name}.npy", *about))
            for name, about in arrays.items()
        }
        for name in ends:
            write[name]([0])
        bar = progress(zip(parts, starts), total=len(parts), desc="writing", disable=not show)
        for columns in in_order(made, bar, threads=2):
            for name in ends:
                columns[name] = ends[name] + columns[name].to_numpy().cumsum()
                ends[name] = int(columns[name][-1])
            for name, values in columns.items():
                write[name](values)
    return arrays


@contextlib.contextmanager
def _writing(path, dtype, shape):
    """Gives a function that writes the next rows of a .npy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": dtype, "fortran_order": False, "shape": tuple(shape)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda values: file.write(np.ascontiguousarray(values, dtype).data)
