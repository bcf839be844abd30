"""MovieLens-100K: joined as published; damaged or out of reach, a clear error."""

import csv
import io
import zipfile

import numpy as np
import pytest

from conftest import ROOT
from data import movielens

WHEEL = ROOT / "data" / movielens.WHEEL


@pytest.fixture(scope="module")
def ratings():
    return movielens.fetch_movielens(ROOT / "data")


def test_the_published_counts(ratings):
    assert len(ratings) == 100_000
    assert (ratings["user_id"].nunique(), ratings["item_id"].nunique()) == (943, 1682)
    stars = ratings["rating"].value_counts().sort_index().tolist()
    assert stars == [6110, 11370, 27145, 34174, 21201]
    order = ratings[["timestamp", "user_id", "item_id"]].to_numpy().tolist()
    assert order == sorted(order)  # many ratings have the same second
    assert ratings["user_id"].value_counts().min() >= 20


def test_the_join_equals_reading_line_by_line(ratings):
    def lines(name):
        with zipfile.ZipFile(WHEEL) as wheel:
            text = wheel.read(f"recbole/dataset_example/ml-100k/ml-100k.{name}").decode()
        reader = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        return list(reader)[1:]

    users = {fields[0]: fields[1:] for fields in lines("user")}
    films = {fields[0]: fields[1:] for fields in lines("item")}
    stars = {(fields[0], fields[1]): (fields[2], fields[3]) for fields in lines("inter")}
    for row in ratings.iloc[::97].itertuples():
        user, film = str(row.user_id), str(row.item_id)
        assert [str(row.age), row.gender, row.occupation, row.zip_code] == users[user]
        title, year, genres = films[film]
        assert row.title == title and row.genres == genres.split(" ")
        assert row.release_year == int(year) if year.isdigit() else np.isnan(row.release_year)
        assert (str(row.rating), str(row.timestamp)) == stars[user, film]


def test_a_damaged_file_is_refused(ratings, tmp_path):
    damaged = tmp_path / WHEEL.name
    damaged.write_bytes(WHEEL.read_bytes()[:-1])
    with pytest.raises(ValueError, match=WHEEL.name):
        movielens.fetch_movielens(tmp_path)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ConnectionError, match="data/README.md"):
        movielens.fetch_movielens(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_stand_in_has_the_same_columns(ratings):
    stand_in = movielens.toy_ratings(500)
    assert sorted(stand_in.columns) == sorted(ratings.columns)
    assert isinstance(stand_in["genres"][0], list)
