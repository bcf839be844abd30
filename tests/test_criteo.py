"""The Criteo cache, against a slow line-by-line reader written here on its own."""

import collections
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ROOT
from data.criteo import CATEGORIES, CRITEO_KAGGLE_TABLE_SIZES
from data.files import MISSING, FormatError
from data.folder import bounds
from data.toy_clicks import write_toy_criteo
from dlrm_utils import load_criteo, preprocess_criteo

GOOD = "\t".join(["1"] + [str(k) for k in range(13)] + [f"{k:08x}" for k in range(26)])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    raw = tmp_path_factory.mktemp("criteo") / "toy.txt"
    write_toy_criteo(raw, 1_500)
    return raw


@pytest.fixture(scope="module")
def data(toy):
    return preprocess_criteo(toy, toy.with_name("processed"), progress=False)


def write_lines(path, lines, end="\n"):
    path.write_bytes((end.join(lines) + end).encode("latin-1"))
    return path


def ids_slowly(rows, column, min_count=1, max_rows=None):
    """Ids of one column: counted on blocks 1 to 6, by falling count, ties by first sight."""
    block_sizes = [len(rows) // 7 + (b < len(rows) % 7) for b in range(7)]
    counts = collections.Counter(fields[column].lower() for fields in rows[: sum(block_sizes[:6])])
    kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: -counts[v])
    ids = {
        value: i + 1 for i, value in enumerate(kept[: None if max_rows is None else max_rows - 1])
    }
    return [ids.get(fields[column].lower(), 0) for fields in rows], len(ids) + 1


@pytest.mark.parametrize("min_count, max_rows", [(1, None), (3, None), (1, 20), (2, 7)])
def test_rows_and_ids_equal_the_slow_reader(toy, tmp_path, min_count, max_rows):
    data = preprocess_criteo(toy, tmp_path / "p", min_count, max_rows, progress=False)
    rows = [line.split("\t") for line in toy.read_text().splitlines()]
    assert len(data) == len(rows) and data.labels.tolist() == [int(fields[0]) for fields in rows]
    assert data.dense.tolist() == [
        [MISSING if x == "" else int(x) for x in fields[1:14]] for fields in rows
    ]
    for j in range(26):
        ids, size = ids_slowly(rows, 14 + j, min_count, max_rows)
        assert data.sparse[:, j].tolist() == ids and data.table_sizes[j] == size


def test_types_and_files(data, toy):
    kinds = [(array.dtype, array.shape) for array in (data.labels, data.dense, data.sparse)]
    assert kinds == [("u1", (1_500,)), ("i4", (1_500, 13)), ("i4", (1_500, 26))]
    assert len(data.table_sizes) == 26 and isinstance(data.dense, np.memmap)
    assert {path.name for path in toy.parent.iterdir()} == {"toy.txt", "processed"}
    files = {str(path.relative_to(data.path)) for path in data.path.rglob("*") if path.is_file()}
    vocabularies = [f"encoder/{14 + j}-C{j + 1}.csv" for j in range(26)]
    assert files == {
        "labels.npy",
        "dense.npy",
        "sparse.npy",
        "source.json",
        "encoder/settings.json",
        *vocabularies,
    }


def test_the_vocabulary_files_are_read_without_this_module(data, toy):
    """By pandas alone, the ids of a column become its categories again."""
    rows = [line.split("\t") for line in toy.read_text().splitlines()]
    for j in (0, 2, 25):
        table = pd.read_csv(data.path / f"encoder/{14 + j}-C{j + 1}.csv", dtype=str)
        assert table["id"].tolist() == [str(k + 1) for k in range(len(table))]
        categories = table["name"].fillna("")
        ids = np.load(data.path / "sparse.npy", mmap_mode="r")[:, j]
        for row in np.flatnonzero(ids)[::50]:
            assert categories[ids[row] - 1] == rows[row][14 + j]


def test_every_name_of_a_vocabulary_is_encoded_as_its_id(data):
    for j, column in enumerate(CATEGORIES):
        names = data.encoder.names(column)
        assert data.table_sizes[j] == 1 + len(names)
        lines = [field(15 + j, name or "") for name in names]
        lines += [line.upper() for line in lines[:3]] + [field(15 + j, "0000beef")]
        ids = [*range(1, len(names) + 1), *range(1, len(names) + 1)[:3], 0]
        assert data.encode(lines).indices[j].tolist() == ids
    with pytest.raises(ValueError, match="8 hex digits"):
        data.encode(field(15, "0000aaaabb"))


@pytest.mark.parametrize("rows", [7, 8, 13, 14, 20, 700])
def test_blocks_and_split(tmp_path, rows):
    data = preprocess_criteo(
        write_lines(tmp_path / "raw.txt", [GOOD] * rows), tmp_path / "p", progress=False
    )
    sizes = np.diff(data.block_offsets)
    assert (
        len(data.block_offsets) == 8
        and data.block_offsets[0] == 0
        and data.block_offsets[7] == rows
    )
    assert sizes.max() - sizes.min() <= 1 and sorted(sizes, reverse=True) == sizes.tolist()
    assert list(data.train) + list(data.test) + list(data.validation) == list(range(rows))
    assert len(data.train) == sum(sizes[:6]) and 0 <= len(data.test) - len(data.validation) <= 1


def test_the_published_split_of_the_full_file():
    sizes = np.diff(bounds(45_840_617, 7))
    assert sizes.tolist() == [6_548_660] * 4 + [6_548_659] * 3 and sizes[:6].sum() == 39_291_958
    assert sum(CRITEO_KAGGLE_TABLE_SIZES) == 33_762_577


def test_vocabularies_ignore_the_seventh_block(tmp_path):
    new = GOOD.replace("00000019", "0000beef")
    data = preprocess_criteo(
        write_lines(tmp_path / "raw.txt", [GOOD] * 6 + [new]), tmp_path / "p", progress=False
    )
    assert data.sparse[:, 25].tolist() == [1] * 6 + [0] and data.table_sizes == [2] * 26


@pytest.mark.parametrize(
    "rows",
    [
        range(5),
        range(3, 40, 7),
        slice(2, 9),
        [5, 1, 1],
        np.array([900, 3]),
        range(0),
        range(4, 0, -1),
        [-1, 3],
    ],
)
def test_batch(data, rows):
    picked = (
        np.arange(len(data))[rows] if isinstance(rows, slice) else np.array(list(rows), dtype=int)
    )
    batch = data.batch(rows)
    assert (
        batch.dense.shape == (len(picked), 13)
        and batch.dense.dtype == batch.labels.dtype == torch.float32
    )
    assert len(batch.indices) == len(batch.offsets) == 26
    for n, row in enumerate(picked):
        assert batch.labels[n] == data.labels[row]
        for k in range(13):
            x = int(data.dense[row, k])
            assert math.isclose(
                batch.dense[n, k], 0.0 if x == MISSING else math.log1p(max(x, 0)), rel_tol=1e-6
            )
        assert [int(ids[n]) for ids in batch.indices] == data.sparse[row].tolist()
    assert all(offsets.tolist() == list(range(len(picked))) for offsets in batch.offsets)


def test_encode_gives_the_same_batch_with_and_without_label(data, toy):
    lines = toy.read_text().splitlines()[:30]
    expected = data.batch(range(30))
    for given in (lines, "\n".join(lines) + "\n", [line + "\n" for line in lines]):
        encoded = data.encode(given)
        assert torch.equal(encoded.dense, expected.dense) and torch.equal(
            encoded.labels, expected.labels
        )
        assert all(map(torch.equal, encoded.indices, expected.indices))
    unlabelled = data.encode([line.split("\t", 1)[1] for line in lines])
    assert unlabelled.labels is None and all(map(torch.equal, unlabelled.indices, expected.indices))
    assert data.encode(GOOD.replace("00000000", "deadbeef")).indices[0].tolist() == [0]
    assert data.encode([]).dense.shape == (0, 13)
    with pytest.raises(FormatError, match="lines, line 2, column 40"):
        data.encode([GOOD, GOOD[:-1]])


def field(number, text):
    fields = GOOD.split("\t")
    fields[number - 1] = text
    return "\t".join(fields)


BAD_LINES = {
    "too few fields": (GOOD.rsplit("\t", 1)[0], 39),
    "too many fields": (GOOD + "\t", 40),
    "empty line": ("", 1),
    "label 2": (field(1, "2"), 1),
    "label empty": (field(1, ""), 1),
    "label text": (field(1, "click"), 1),
    "label minus": (field(1, "-"), 1),
    "label tab": (field(1, "\t"), 40),
    "no number": (field(2, "x"), 2),
    "fraction": (field(3, "1.0"), 3),
    "plus sign": (field(3, "+1"), 3),
    "space": (field(4, " 1"), 4),
    "too large": (field(14, str(2**31)), 14),
    "only a sign": (field(5, "-"), 5),
    "7 digits": (field(15, "0123abc"), 15),
    "9 digits": (field(15, "0123abcde"), 15),
    "no hex": (field(40, "0123abcg"), 40),
    "underscore": (field(6, "1_0"), 6),
    "NUL": (field(16, "\0" * 8), 16),
    "quotes": (field(17, '"0000aaaa"'), 17),
    "sign": (field(19, "+1234567"), 19),
    "underscores": (field(20, "0000_000"), 20),
    "minus": (field(21, "-1234567"), 21),
    "label +1": (field(1, "+1"), 1),
    "label 01": (field(1, "01"), 1),
    "label space": (field(1, " 1"), 1),
    "BOM": ("\xef\xbb\xbf" + GOOD, 1),
    "11 digits": (field(8, "00000000001"), 8),
    "a lone space": (field(9, " "), 9),
    "missing marker": (field(10, str(-(2**31))), 10),
    "carriage return in a field": (field(11, "5\r"), 11),
    "two carriage returns": (GOOD + "\r\r", 40),
    "a blank": (field(40, " "), 40),
    "only a carriage return": ("\r", 1),
    "UTF-8 cut": (field(22, "0000aaa\xc3"), 22),
    "39 fields": (GOOD.split("\t", 1)[1], 39),
    "not ASCII": (field(18, "0000aaa\xe9"), 18),
    "arabic digit": (field(7, "\u0663".encode().decode("latin-1")), 7),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_refused_with_file_line_and_column(tmp_path, name):
    bad, column = BAD_LINES[name]
    raw = write_lines(tmp_path / "raw.txt", [GOOD] * 8 + [bad] + [GOOD] * 3)
    with pytest.raises(FormatError, match=rf"raw.txt, line 9, column {column}\b"):
        preprocess_criteo(raw, tmp_path / "p", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.txt"]


def test_a_header_and_a_cut_last_line_are_refused(tmp_path):
    header = "\t".join(["label"] + ["I"] * 13 + ["C"] * 26)
    with pytest.raises(FormatError, match="line 1, column 1 .*a table with a header"):
        preprocess_criteo(
            write_lines(tmp_path / "a", [header] + [GOOD] * 9), tmp_path / "p", progress=False
        )
    with pytest.raises(FormatError, match="line 10"):
        preprocess_criteo(
            write_lines(tmp_path / "b", [GOOD] * 9 + [GOOD[:90]]), tmp_path / "p", progress=False
        )


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_fewer_than_seven_rows_are_refused(tmp_path, rows):
    raw = tmp_path / "raw.txt"
    raw.write_text((GOOD + "\n") * rows)
    with pytest.raises(FormatError, match=f"{rows} rows"):
        preprocess_criteo(raw, tmp_path / "p", progress=False)


def test_crlf_no_final_newline_and_capital_digits_are_read(tmp_path):
    plain = preprocess_criteo(
        write_lines(tmp_path / "a", [GOOD] * 9), tmp_path / "a1", progress=False
    )
    crlf = preprocess_criteo(
        write_lines(tmp_path / "b", [GOOD.upper()] * 9, "\r\n"), tmp_path / "b1", progress=False
    )
    (tmp_path / "c").write_text("\n".join([GOOD] * 9))
    unended = preprocess_criteo(tmp_path / "c", tmp_path / "c1", progress=False)
    for other in (crlf, unended):
        assert np.array_equal(plain.sparse, other.sparse) and np.array_equal(
            plain.dense, other.dense
        )


def test_ten_digits_are_read(tmp_path):
    numbers = ["2147483647", "-2147483647", "0000000012", "-0", "007"]
    lines = [field(2 + k % 13, number) for k, number in enumerate(numbers * 3)]
    data = preprocess_criteo(write_lines(tmp_path / "raw", lines), tmp_path / "p", progress=False)
    read = [int(data.dense[k, k % 13]) for k in range(len(lines))]
    assert read == [int(number) for number in numbers * 3]


def test_names_with_wildcards_are_names(toy, tmp_path):
    folder = tmp_path / "[1]*?"
    folder.mkdir()
    shutil.copy(toy, folder / "*.txt")
    write_toy_criteo(folder / "other.txt", 10)
    data = preprocess_criteo(folder / "*.txt", folder / "{p}[0]", progress=False)
    assert len(data) == 1_500 and len(load_criteo(folder / "{p}[0]")) == 1_500


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_processed_folder_is_reused_only_for_what_it_was_made_from(toy, tmp_path):
    processed = tmp_path / "p"
    stamps = [
        path.stat().st_mtime_ns
        for path in preprocess_criteo(toy, processed, progress=False).path.iterdir()
    ]
    preprocess_criteo(toy, processed, progress=False)
    with pytest.raises(ValueError, match="p was made from .* not "):
        preprocess_criteo(toy, processed, min_count=2, progress=False)
    other = write_lines(tmp_path / "other.txt", [GOOD] * 9)
    with pytest.raises(ValueError, match="p was made from .* not "):
        preprocess_criteo(other, processed, progress=False)
    assert stamps == [path.stat().st_mtime_ns for path in processed.iterdir()]


def test_an_empty_folder_is_filled(toy, tmp_path):
    (tmp_path / "p").mkdir()
    assert len(preprocess_criteo(toy, tmp_path / "p", progress=False)) == 1_500


def test_a_folder_that_is_not_ours_is_refused_and_left(toy, tmp_path):
    for name in ("thesis", "thesis.making"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter.txt").write_text("years of work")
        before = contents(tmp_path)
        with pytest.raises(FormatError, match=name):
            preprocess_criteo(toy, tmp_path / "thesis", progress=False)
        assert contents(tmp_path) == before
        shutil.rmtree(tmp_path / "thesis", ignore_errors=True)


def test_a_file_of_the_first_edition_is_refused_with_the_command(toy, tmp_path):
    np.savez(tmp_path / "criteo.npz", labels=np.zeros(3))
    before = contents(tmp_path)
    for call in (load_criteo, lambda path: preprocess_criteo(toy, path, progress=False)):
        with pytest.raises(FormatError, match=r"dlrm_utils.py preprocess RAW FOLDER"):
            call(tmp_path / "criteo.npz")
    assert contents(tmp_path) == before


def broken(folder, name):
    """Break a processed folder in one of many ways."""
    path = folder / name.split(" ")[0]
    array = np.load(path) if path.suffix == ".npy" else None
    match name.split(" ")[1:]:
        case ["absent"]:
            path.unlink()
        case ["cut"]:
            path.write_bytes(path.read_bytes()[:-1])
        case ["empty"]:
            path.write_bytes(b"")
        case ["text"]:
            path.write_text("no array")
        case ["type"]:
            np.save(path, array.astype(np.float64))
        case ["shape"]:
            np.save(path, np.stack([array, array]))
        case ["rows"]:
            np.save(path, array[:-1])
        case ["pickled"]:
            np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        case ["zip"]:
            with open(path, "wb") as file:
                np.savez(file, array)
        case ["other"]:
            path.write_text(json.dumps({"format": "another"}))
        case ["list"]:
            path.write_text("[1]")


BROKEN = [
    "source.json absent",
    "source.json empty",
    "source.json text",
    "source.json other",
    "source.json list",
    *(f"encoder/settings.json {how}" for how in ("absent", "empty", "text", "other", "list")),
]
BROKEN += [
    f"{name} {how}"
    for name in ("labels.npy", "dense.npy", "sparse.npy")
    for how in ("absent", "cut", "empty", "text", "type", "shape", "rows", "pickled", "zip")
]
BROKEN += [
    f"encoder/{name}.csv {how}"
    for name in ("16-C3", "39-C26")
    for how in ("absent", "cut", "empty")
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_whole_is_refused_and_left(data, toy, tmp_path, name):
    folder = tmp_path / "broken"
    shutil.copytree(data.path, folder)
    broken(folder, name)
    before = contents(folder)
    for call in (load_criteo, lambda path: preprocess_criteo(toy, path, progress=False)):
        with pytest.raises(FormatError, match="broken is not a whole processed folder"):
            call(folder)
    assert contents(folder) == before


def test_what_is_not_there_is_said(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_criteo(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        preprocess_criteo(tmp_path / "nowhere.txt", tmp_path / "p")
    for options in ({"min_count": 0}, {"max_table_rows": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            preprocess_criteo(toy, tmp_path / "p", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_preprocess_command(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "dlrm_utils.py"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    write_toy_criteo(tmp_path / "toy.txt", 500, seed=4)
    done = run("preprocess", "toy.txt", "deep/toy", "--min-count", "2", "--max-table-rows", "9")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert all(word in done.stdout for word in ("500 rows", "rows/s"))
    assert max(load_criteo(tmp_path / "deep/toy").table_sizes) == 9
    (tmp_path / "bad.txt").write_text("x\n" * 9)
    done = run("preprocess", "bad.txt", "bad")
    assert (
        done.returncode == 1 and "bad.txt, line 1" in done.stderr and "Traceback" not in done.stderr
    )
