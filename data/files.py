"""What all rooms share: progress, threads, files that are whole or absent, hashes, one lock."""

import collections
import contextlib
import gzip
import hashlib
import json
import os
import secrets
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
from filelock import FileLock, Timeout
from tqdm import tqdm

MISSING = np.iinfo(np.int32).min  # how a missing integer is marked on the disk
PIECE = 1 << 24  # bytes of text that are read and parsed together
DAMAGE = (pl.exceptions.PolarsError, EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error)


class FormatError(ValueError):
    """Rows or a folder that are not what they should be; the message says where."""


@contextlib.contextmanager
def damage_named(place):
    """What a damaged or mistaken file gives, as a FormatError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise FormatError(f"{place} is damaged, or misnamed: {error}") from error


# ---- Work that takes long ------------------------------------------------------------------------


def progress(items, **options):
    """The items, under tqdm's bar where they take long; at the end it takes its own line away.

    There is none with TQDM_DISABLE=1, nor in a notebook that a program runs: it would be stored.
    """
    ipython = sys.modules.get("IPython")  # nothing is imported to find out
    kernel, watched = getattr(ipython and ipython.get_ipython(), "kernel", None), True
    with contextlib.suppress(AttributeError, KeyError):  # a person could be asked for input
        watched = kernel.get_parent("shell")["content"]["allow_stdin"]
    own = {"file": sys.stdout, "delay": 3} if kernel else {"file": sys.stderr, "delay": 0.5}
    if not watched or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        options["disable"] = True
    return tqdm(items, **own | {"leave": False} | options)


def in_order(function, items, threads):
    """Yield function(item) for each item in order, computed in threads, a few items ahead."""
    pending = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


# ---- Files that are whole or absent --------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Write to a temporary file beside path; whole and on the disk, it takes path's place.

    Its name is its own, so that two programs may write the same file: one of them is there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path):
    """Wait until the disk holds a file, or a folder's names: then a power cut loses nothing."""
    if os.name != "nt":  # Windows has no such call for what is open for reading
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hash_of(content):
    """A short hash of what JSON can hold; ValueError for infinity and NaN, which it cannot."""
    text = json.dumps(content, default=np.generic.item, allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path):
    """A short hash of all of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_json(path, version, content):
    """Write a dict with its version and fingerprint; `read_json` refuses any other file."""
    head = {"format": version, "fingerprint": hash_of(content)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(head | content, default=np.generic.item), "utf-8")


def read_json(path, version):
    """The dict that `write_json` wrote, or ValueError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found, fingerprint = content.pop("format"), content.pop("fingerprint")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole file of {version}") from error
    if found != version:
        raise ValueError(f"{path} is of another version or kind: {found}, not {version}")
    if fingerprint != hash_of(content):
        raise ValueError(f"{path} was changed after it was written")
    return content


@contextlib.contextmanager
def waiting_lock(path, for_what):
    """Hold the lock file at path alone; a second process waits, and says for what."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process: {for_what}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
