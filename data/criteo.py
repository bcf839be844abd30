"""Criteo's columns, what was published of them, and its text: read, or a bad line named.

A line is a label, 13 integers and 26 categories of 8 hex digits between tabs, empty where missing.
"""

import contextlib
import gzip
import re
import tarfile
from pathlib import Path

import polars as pl

from data import files
from data.files import MISSING, FormatError

NUM_DENSE, NUM_TABLES = 13, 26
INTEGERS = [f"I{k + 1}" for k in range(NUM_DENSE)]
CATEGORIES = [f"C{k + 1}" for k in range(NUM_TABLES)]
COLUMNS = ["label", *INTEGERS, *CATEGORIES]
# Distinct values of the 26 categorical columns in Criteo's Kaggle file, as published.
CRITEO_KAGGLE_TABLE_SIZES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]  # fmt: skip
KAGGLE_ROWS = 45_840_617

FIELDS = {"l": "[01]", "I": "(?:-?[0-9]{1,10})?", "C": "(?:[0-9a-fA-F]{8})?"}
WANTED = {"l": "a label, 0 or 1", "I": "a 32-bit integer", "C": "a category of 8 hex digits"}
TYPES = {"l": pl.UInt8, "I": pl.Int32, "C": pl.String}
SCHEMA = {column: TYPES[column[0]] for column in COLUMNS}
TABLE_HINT = "; a table with a header is known by .csv or .parquet, a .zip has to be unpacked"
LINES = ["\t".join(FIELDS[name[0]] for name in names) for names in (COLUMNS, COLUMNS[1:])]
WHOLE = [re.compile(line) for line in LINES]  # with a label, and without


def is_table(path):
    """Is a file a table with a header, by its name?"""
    return Path(path).suffix.lower() in (".csv", ".parquet")


# ---- One line ------------------------------------------------------------------------------------


def read_line(line, place, labelled=True):
    """(label or None, 13 integers, 26 categories) of a line; None where a field is empty.

    FormatError, with place and the column counted from 1, for any field that is not what it
    should be. The reader of many lines calls it to find the bad one.
    """
    line, columns = line.removesuffix("\r"), COLUMNS if labelled else COLUMNS[1:]
    fields = line.split("\t")
    if len(fields) != len(columns):
        found = f"{line[:40]!r} has {len(fields)} fields, not {len(columns)}{TABLE_HINT}"
        raise FormatError(f"{place}, column {min(len(fields), len(columns))}: {found}")
    integers, names = fields[-NUM_TABLES - NUM_DENSE : -NUM_TABLES], fields[-NUM_TABLES:]
    if not WHOLE[not labelled].fullmatch(line) or max(map(len, integers)) > 9:
        for k, (column, field) in enumerate(zip(columns, fields), 1):
            kind = column[0]
            right = re.fullmatch(FIELDS[kind], field)
            if not right or (kind == "I" and field and abs(int(field)) >= 2**31):
                hint = TABLE_HINT if kind == "l" else ""
                found = f"{field[:40]!r} is not {WANTED[kind]}{hint}"
                raise FormatError(f"{place}, column {k} ({column}): {found}")
    label = int(fields[0]) if labelled else None
    integers = [int(field) if field else None for field in integers]
    return label, integers, [name.lower() or None for name in names]


# ---- Many lines ----------------------------------------------------------------------------------


def parsed(text, name, first_line=1, labelled=True):
    """A DataFrame with the columns of SCHEMA from whole lines as bytes, or FormatError."""
    schema = {column: SCHEMA[column] for column in COLUMNS[not labelled :]}
    options = {"separator": "\t", "has_header": False, "quote_char": None, "raise_if_empty": False}
    line = f"^{LINES[not labelled]}$"
    if not text or (text.isascii() and pl.read_lines(text)["line"].str.contains(line).all()):
        with contextlib.suppress(pl.exceptions.PolarsError):  # of ten digits some are too many
            frame = pl.read_csv(text.lower(), schema=schema, **options)
            if not any(frame[column].min() == MISSING for column in INTEGERS):
                return frame
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), first_line):
        read_line(line.decode("ascii", "replace"), f"{name}, line {number}", labelled)
    raise FormatError(f"{name}, after line {first_line}: no line is bad, but they cannot be read")


def frames(path, labelled=True):
    """The checked rows of Criteo's text, a DataFrame with the columns of SCHEMA at a time."""

    def parse(piece):
        first_line, text = piece
        return parsed(text, path, first_line, labelled)

    with unpacked(path) as file:
        yield from files.in_order(parse, pieces(file, path), threads=2)


def is_labelled(path):
    """Does the first line have a label? A line of any other form is taken to have one."""
    with unpacked(path) as file:
        return file.readline(1 << 16).count(b"\t") != len(COLUMNS) - 2


def check_end(path):
    """Look at the last line, and through a packed file: a cut one is found before hours of work."""
    line, path = b"", Path(path)
    with unpacked(path) as file:
        if path.suffix.lower() not in (".gz", ".tgz"):
            file.seek(max(path.stat().st_size - files.PIECE, 0))
        for _, text in pieces(file, path):
            line = text.removesuffix(b"\n").rsplit(b"\n", 1)[-1]
    read_line(line.removeprefix(b"\xef\xbb\xbf").decode("ascii", "replace"), f"{path}, last line")


@contextlib.contextmanager
def unpacked(path):
    """The raw file, open; its bytes are those of the plain text."""
    path = Path(path)
    name = path.name.lower()
    with files.damage_named(path):
        if name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path, "r|gz") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).name == "train.txt":
                        yield archive.extractfile(member)
                        return
            raise tarfile.ReadError("it holds no file train.txt")
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
            yield file


def pieces(file, name):
    """The text in pieces of whole lines: (number of the first line, bytes); a BOM is left out."""
    line = 1
    while text := file.read(files.PIECE):
        if line == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        rest = file.readline(files.PIECE)
        if len(rest) == files.PIECE and not rest.endswith(b"\n"):
            line += text.count(b"\n")
            raise FormatError(f"{name}, line {line}, column 1: over {files.PIECE:,} bytes long")
        yield line, text + rest
        line += text.count(b"\n") + rest.count(b"\n")


# ---- Tables with Criteo's columns ----------------------------------------------------------------

HEX, NUMBER = "^[0-9a-fA-F]{8}$", "^(?:0|-?[1-9][0-9]*)$"


def tidy(table_pieces):
    """Pieces of a table, its categories in small letters; a half one is refused by its row.

    They are 8 hex digits, as in Criteo's text, or whole numbers, as some copies have them: the
    first column that tells binds the others.
    """
    wanted = None
    for piece in table_pieces:
        made = {}
        for k, column in enumerate(piece.columns):
            if column.name not in CATEGORIES:
                continue
            names = piece.frame[str(k)]
            if names.dtype == pl.Float64:
                piece.refuse(k, names != names.floor(), "not a whole number")
            elif names.dtype == pl.String:
                numbers = names.str.contains(NUMBER).all()
                if wanted is None and names.str.contains(HEX).all() != numbers:
                    wanted = NUMBER if numbers else HEX
                what = "a whole number" if wanted == NUMBER else WANTED["C"]
                piece.refuse(k, ~names.str.contains(wanted or HEX), f"not {what}")
                made[str(k)] = names.str.to_lowercase()
        yield piece._replace(frame=piece.frame.with_columns(**made))
