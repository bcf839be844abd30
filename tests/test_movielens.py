"""MovieLens-100K: joined as published; damaged or out of reach, a clear error and nothing half-written."""
import re

import numpy as np
import pytest

from notebook_definitions import ROOT
import dlrm_utils


@pytest.fixture(scope="module")
def ratings():
    return dlrm_utils.fetch_movielens(ROOT / "data")


def test_the_published_counts(ratings):
    assert len(ratings) == 100_000
    assert (ratings["user_id"].nunique(), ratings["item_id"].nunique()) == (943, 1682)
    assert ratings["rating"].value_counts().sort_index().tolist() == [6110, 11370, 27145, 34174, 21201]
    assert ratings["timestamp"].is_monotonic_increasing and ratings["user_id"].value_counts().min() >= 20


def test_the_join_equals_reading_line_by_line(ratings):
    def lines(name):
        text = (ROOT / "data/ml-100k" / name).read_text(encoding="utf-8")
        return [line.split("\t") for line in text.splitlines()[1:]]

    users = {fields[0]: fields[1:] for fields in lines("ml-100k.user")}
    films = {fields[0]: fields[1:] for fields in lines("ml-100k.item")}
    stars = {(fields[0], fields[1]): (fields[2], fields[3]) for fields in lines("ml-100k.inter")}
    for row in ratings.iloc[::97].itertuples():
        user, film = str(row.user_id), str(row.item_id)
        assert [str(row.age), row.gender, row.occupation, row.zip_code] == users[user]
        title, year, genres = films[film]
        assert row.title == title and row.genres == genres.split(" ")
        assert np.isnan(row.release_year) if not year.isdigit() else row.release_year == int(year)
        assert (str(row.rating), str(row.timestamp)) == stars[user, film]


def test_a_damaged_file_is_refused(ratings, tmp_path):
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    for name in dlrm_utils.MOVIELENS_SHA256:
        (folder / name).write_bytes((ROOT / "data/ml-100k" / name).read_bytes())
    (folder / "ml-100k.user").write_text("user_id:token\n")
    with pytest.raises(ValueError, match=re.escape("ml-100k.user")):
        dlrm_utils.fetch_movielens(tmp_path)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConnectionError, match="data/README.md"):
        dlrm_utils.fetch_movielens(tmp_path)
    assert not (tmp_path / "ml-100k").exists()


def test_the_stand_in_has_the_same_columns(ratings):
    stand_in = dlrm_utils.toy_ratings(500)
    assert sorted(stand_in.columns) == sorted(ratings.columns) and isinstance(stand_in["genres"][0], list)
