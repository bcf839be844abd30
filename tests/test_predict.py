"""`predict_file` and its command: what a saved model scores, what it refuses, what it leaves."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from data import toy_clicks
from dlrm_models import load_model, main, predict_file, save_model
from dlrm_utils import FrameEncoder, preprocess_criteo, preprocess_table

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"embedding_dim": 4, "bottom_mlp": [8], "top_mlp": [8]}


@pytest.fixture(scope="module")
def clicks(notebook, tmp_path_factory):
    """(model folder, raw text, its probabilities) of toy clicks, through a folder."""
    place = tmp_path_factory.mktemp("clicks")
    toy_clicks.write_toy_criteo(place / "toy.txt", 2_000)
    data = preprocess_criteo(place / "toy.txt", place / "p", progress=False)
    torch.manual_seed(0)
    model = notebook.DLRM(data.table_sizes, **SETTINGS)
    save_model(place / "m", {"class": "DLRM"} | SETTINGS, model, data)
    with torch.inference_mode():
        expected = torch.sigmoid(model(*data.batch(range(2_000))[:3])).numpy()
    return place / "m", place / "toy.txt", expected


def probabilities(path):
    return np.array(path.read_text().split(), float)


def assert_scored(model_folder, path, out, expected):
    assert predict_file(model_folder, path, out) == len(expected)
    assert np.allclose(probabilities(out), expected, atol=1e-6)
    assert [each.name for each in out.parent.glob(".*")] == []


# ---- Criteo's rows, as text and as tables ----


def test_text_packed_text_and_tables_of_the_same_rows_score_alike(clicks, tmp_path):
    model, raw, expected = clicks
    names = ["label", *(f"I{k}" for k in range(1, 14)), *(f"C{k}" for k in range(1, 27))]
    types = {name: pl.String if name[0] == "C" else pl.Int64 for name in names}
    frame = pl.read_csv(raw, separator="\t", has_header=False, schema=types)
    frame.write_csv(tmp_path / "rows.csv")
    frame.write_parquet(tmp_path / "rows.PARQUET")
    frame.drop("label").write_csv(tmp_path / "unlabelled.csv")
    (tmp_path / "rows.GZ").write_bytes(gzip.compress(raw.read_bytes()))
    cut = [line.partition("\t")[2] for line in raw.read_text().splitlines(keepends=True)]
    (tmp_path / "unlabelled.txt").write_text("".join(cut))
    for path in [raw, *sorted(tmp_path.iterdir())]:
        assert_scored(model, path, tmp_path / "out/p", expected)


# ---- Tables of one's own ----

OWN = pl.DataFrame(
    {
        "age": [1.5, 2.0, None, 40.0] * 5,
        "visits": [3, 0, -1, None] * 5,
        "premium": [True, False, None, True] * 5,
        "zip": [10115, 80331, 10115, None] * 5,
        "day": pl.Series(["2026-01-01", "2026-01-02", None, "2026-01-01"] * 5).str.to_date(),
        "adult": [True, False, True, False] * 5,
        "click": [0, 1, 1, 0] * 5,
    }
)


@pytest.fixture(scope="module", params=["frame", "folder"])
def own(request, notebook, tmp_path_factory):
    """(model folder, probabilities of OWN), the encoder fitted on a frame or by a folder."""
    place = tmp_path_factory.mktemp("own")
    encoder = FrameEncoder(
        dense=["age", "adult"], counts=["visits"], categorical=["premium", "zip", "day"],
        label="click",
    )  # fmt: skip
    if request.param == "frame":
        encoder.fit(OWN)
    else:
        encoder = preprocess_table(
            pl.concat([OWN] * 2), place / "p", encoder=encoder, progress=False
        ).encoder
    settings = SETTINGS | {"num_dense": 3}
    torch.manual_seed(0)
    model = notebook.DLRM(encoder.table_sizes, **settings)
    save_model(place / "m", {"class": "DLRM"} | settings, model, encoder)
    with torch.inference_mode():
        expected = torch.sigmoid(model(*encoder.transform(OWN)[:3])).numpy()
    assert len(np.unique(expected)) == 4
    return place / "m", expected


def test_a_csv_with_booleans_dates_and_its_label_scores_as_the_frame(own, tmp_path):
    model, expected = own
    OWN.write_csv(tmp_path / "labelled.csv")
    OWN.drop("click").write_csv(tmp_path / "unlabelled.csv")
    OWN.write_parquet(tmp_path / "rows.parquet")
    frame = pd.DataFrame(OWN.to_dict(as_series=False))
    frame.to_csv(tmp_path / "pandas.csv", index=False)  # True and False, 10115.0
    OWN.select(reversed(OWN.columns)).with_columns(more=pl.lit("x")).write_csv(tmp_path / "w.csv")
    for path in sorted(tmp_path.iterdir()):
        assert_scored(model, path, tmp_path / "out/p", expected)


def test_bags_are_scored_from_a_parquet(notebook, tmp_path):
    frame = pl.DataFrame({"year": [1.0, 2.0, 3.0], "liked": [["Alien", "Up"], [], ["Up"]]})
    encoder = FrameEncoder(["year"], [], ["liked"]).fit(frame)
    settings = SETTINGS | {"num_dense": 1}
    model = notebook.DLRM(encoder.table_sizes, **settings)
    save_model(tmp_path / "m", {"class": "DLRM"} | settings, model, encoder)
    frame.write_parquet(tmp_path / "rows.parquet")
    with torch.inference_mode():
        expected = torch.sigmoid(model(*encoder.transform(frame)[:3])).numpy()
    assert_scored(tmp_path / "m", tmp_path / "rows.parquet", tmp_path / "out/p", expected)


# ---- What is said of bad rows ----


@pytest.mark.parametrize("row", [2, 1_500])
def test_a_bad_line_of_text_is_named_and_nothing_is_left(clicks, tmp_path, row):
    lines = clicks[1].read_text().splitlines(keepends=True)
    lines[row - 1] = lines[row - 1].replace("\t", "\tx", 1)
    path = tmp_path / "bad.txt"
    path.write_text("".join(lines))
    (tmp_path / "out").write_text("older")
    with pytest.raises(ValueError, match=rf"bad\.txt, line {row}, column 2\b"):
        predict_file(clicks[0], path, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "older"
    assert {each.name for each in tmp_path.iterdir()} == {"bad.txt", "out"}


def test_without_labels_the_column_is_counted_as_the_file_has_it(clicks, tmp_path):
    rows = [line.split("\t")[1:] for line in clicks[1].read_text().splitlines()[:9]]
    rows[4][0] = "x"
    (tmp_path / "bad.txt").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 5, column 1\b"):
        predict_file(clicks[0], tmp_path / "bad.txt", tmp_path / "out")


@pytest.mark.parametrize(
    "column, wrong, named",
    [("age", "forty", "age"), ("visits", "3 or 4", "visits"), ("day", "soon", "day")],
)
def test_a_bad_value_in_a_csv_is_named_by_file_row_and_column(own, tmp_path, column, wrong, named):
    frame = OWN.with_columns(pl.all().cast(pl.String))
    values = frame[column].to_list()
    values[11] = wrong
    frame.with_columns(pl.Series(column, values)).write_csv(tmp_path / "bad.csv")
    with pytest.raises(ValueError) as refused:
        predict_file(own[0], tmp_path / "bad.csv", tmp_path / "out")
    told = str(refused.value)
    assert "bad.csv" in told and re.search(r"\b1[23]\b", told) and named in told and wrong in told
    assert "\n" not in told and not (tmp_path / "out").exists()


def test_a_missing_column_is_named_with_the_file(own, tmp_path):
    OWN.drop("zip").write_csv(tmp_path / "less.csv")
    with pytest.raises(ValueError, match=r"less\.csv.*zip"):
        predict_file(own[0], tmp_path / "less.csv", tmp_path / "out")


# ---- What it never overwrites ----


@pytest.mark.parametrize("alias", ["itself", "part", "dots", "symlink", "hard link", "a link"])
def test_its_own_rows_are_never_emptied(clicks, tmp_path, alias):
    rows, content = tmp_path / "day", clicks[1].read_bytes()
    out = tmp_path / {"part": "out", "symlink": "link", "hard link": "link"}.get(alias, "day")
    if alias == "part":
        rows = tmp_path / "out.part"
    rows.write_bytes(content)
    if alias == "dots":
        (tmp_path / "sub").mkdir()
        out = tmp_path / "sub/../day"
    elif alias == "symlink":
        out.symlink_to(rows)
    elif alias == "hard link":
        os.link(rows, out)
    elif alias == "a link":
        rows = tmp_path / "pointer"
        rows.symlink_to(tmp_path / "day")
    if alias == "part":
        assert predict_file(clicks[0], rows, out) == 2_000
    else:
        with pytest.raises(ValueError, match="in the way"):
            predict_file(clicks[0], rows, out)
    assert rows.read_bytes() == content


def test_neither_a_folder_nor_the_model_nor_a_device_is_overwritten(clicks, tmp_path):
    model, raw, _ = clicks
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for out in (tmp_path, model / "settings.json", model / "new", Path("/dev/null")):
        with pytest.raises(ValueError, match="in the way"):
            predict_file(model, raw, out)
    assert before == {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    with pytest.raises(FileNotFoundError):
        predict_file(model, tmp_path / "none.txt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- The command ----


def test_the_command_says_what_it_did_or_one_line(clicks, tmp_path, capsys):
    main(["predict", str(clicks[0]), str(clicks[1]), str(tmp_path / "out")])
    assert re.fullmatch(r"2,000 rows in [\d.]+ s\n", capsys.readouterr().out)
    with pytest.raises(SystemExit, match=r"dlrm_models.py predict: .*no folder") as end:
        main(["predict", str(tmp_path / "none"), str(clicks[1]), str(tmp_path / "out")])
    assert "\n" not in str(end.value)


# Over five seconds: two processes import PyTorch.
@pytest.mark.slow
def test_one_line_costs_little_more_than_the_imports(clicks, tmp_path):
    """Processor seconds of a process: half as much again as the libraries alone, with some air."""
    (tmp_path / "line.txt").write_text(clicks[1].read_text().splitlines()[0] + "\n")
    clock = "import time; print(time.process_time())"
    predict = f"import dlrm_models; dlrm_models.main(['predict', '{clicks[0]}', "
    predict += f"'{tmp_path / 'line.txt'}', '{tmp_path / 'out'}']); {clock}"
    seconds = []
    for code in (f"import torch, polars, pandas; {clock}", predict):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        )
        seconds.append(float(done.stdout.split()[-1]))
    assert np.isclose(probabilities(tmp_path / "out"), clicks[2][0], atol=1e-6)
    assert seconds[1] < 1.7 * seconds[0], seconds


def test_a_model_is_opened_once_and_left_as_it_is(clicks):
    model, encoder = load_model(clicks[0])
    assert not model.training and len(encoder.table_sizes) == 26
