"""MovieLens: each edition read as published; damaged or out of reach, a clear error."""

import csv
import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from data import movielens

WHEEL = ROOT / "data" / movielens.WHEEL
# Films as each edition writes them: title, year, genres.
FILMS = {
    1: ("Toy Story", 1995, ["Animation", "Children's", "Comedy"]),
    2: ("Star Wars: Episode IV, A New Hope", 1977, ["Action", "Sci-Fi"]),
    4: ("Misérables, Les", 1995, ["Drama", "Musical"]),
    7: ("Sabrina", 1954, ["Comedy", "Romance"]),
    9: ("Sabrina", 1995, ["Comedy", "Romance"]),
    11: ("unknown", None, []),
}
RATINGS = [(3, 2, 5, 200), (3, 1, 4, 100), (5, 4, 3, 100), (5, 7, 1, 300), (3, 9, 2, 300)]
RATINGS += [(5, 11, 4, 400)]
PEOPLE = {3: (24, "M", "writer", "05431"), 5: (53, "F", "other", "94043")}


@pytest.fixture(scope="module")
def ratings():
    return movielens.fetch_movielens(ROOT / "data")


# ---- The 100K edition, fetched -----------------------------------------------------------------


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
        same = {
            fields[1] for fields in films.values() if fields[0] == title and fields[1].isdigit()
        }
        assert row.title == (f"{title} ({year})" if len(same) > 1 else title)
        assert row.genres == genres.split(" ")
        assert row.year == int(year) if year.isdigit() else np.isnan(row.year)
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


@pytest.mark.slow  # two processes, each of which starts pip
def test_two_runs_at_once_both_fetch_it(ratings, tmp_path):
    program = (
        "import sys; from data import movielens; print(len(movielens.fetch_movielens(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    there = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEEL.parent)}
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=there, text=True, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["100000"] * 2
    assert [file.name for file in tmp_path.iterdir()] == [WHEEL.name]


def test_the_stand_in_has_columns_of_every_edition(ratings):
    stand_in = movielens.toy_ratings(500)
    assert set(ratings.columns) - set(stand_in.columns) == {
        "age",
        "gender",
        "occupation",
        "zip_code",
    }
    assert isinstance(stand_in["genres"][0], list)


# ---- Any edition, read ---------------------------------------------------------------------------


def dated(title, year):
    return f"{title} ({year})" if year else title


def write_100k(folder):
    lines = ["\t".join(map(str, row)) for row in RATINGS]
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    users = [f"{user}|{'|'.join(map(str, fields))}" for user, fields in PEOPLE.items()]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    films = []
    for film, (title, year, genres) in FILMS.items():
        flags = ["1" if name in (genres or ["unknown"]) else "0" for name in movielens.GENRES]
        films.append(
            "|".join([str(film), dated(title, year), "01-Jan-1995", "", "http://x", *flags])
        )
    (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")


def write_1m(folder, encoding="latin-1", users=True):
    (folder / "ratings.dat").write_text(
        "".join("::".join(map(str, row)) + "\n" for row in RATINGS), encoding=encoding
    )
    if users:
        lines = [f"{user}::{sex}::{age}::{job}::{zip_code}\n" for user, (age, sex, job, zip_code)
                 in PEOPLE.items()]  # fmt: skip
        (folder / "users.dat").write_text("".join(lines))
    films = [
        f"{film}::{dated(title, year)}::{'|'.join(genres) or '(no genres listed)'}\n"
        for film, (title, year, genres) in FILMS.items()
    ]
    (folder / "movies.dat").write_text("".join(films), encoding=encoding)


def write_10m(folder):
    write_1m(folder, "utf-8", users=False)


def write_latest(folder):
    with open(folder / "ratings.csv", "w", newline="") as file:
        rows = [(user, film, stars - 0.5, when) for user, film, stars, when in RATINGS]
        csv.writer(file).writerows([("userId", "movieId", "rating", "timestamp"), *rows])
    with open(folder / "movies.csv", "w", newline="", encoding="utf-8") as file:
        films = [
            (film, dated(title, year), "|".join(genres) or "(no genres listed)")
            for film, (title, year, genres) in FILMS.items()
        ]
        csv.writer(file).writerows([("movieId", "title", "genres"), *films])


WRITERS = {"ml-100k": write_100k, "ml-1m": write_1m, "ml-10M100K": write_10m}
WRITERS |= {"ml-latest-small": write_latest}


@pytest.fixture(params=WRITERS)
def edition(request, tmp_path):
    folder = tmp_path / request.param
    folder.mkdir()
    WRITERS[request.param](folder)
    return folder


def test_an_edition_is_read_as_it_was_written(edition):
    halves = 0.5 if "latest" in edition.name else 0
    expected = []
    for user, film, stars, when in sorted(RATINGS, key=lambda row: (row[3], row[0], row[1])):
        title, year, genres = FILMS[film]
        title = f"{title} ({year})" if title == "Sabrina" else title
        if edition.name == "ml-100k":
            genres = genres or ["unknown"]
        expected.append((user, film, stars - halves, when, title, year or -1, genres))
    read = movielens.read_movielens(edition)
    columns = ["user_id", "item_id", "rating", "timestamp", "title", "year", "genres"]
    assert [*read.fillna({"year": -1})[columns].itertuples(index=False, name=None)] == expected
    if edition.name in ("ml-100k", "ml-1m"):
        people = read[["age", "gender", "occupation", "zip_code"]].itertuples(
            index=False, name=None
        )
        assert list(people) == [PEOPLE[row[0]] for row in expected]
        assert read["rating"].dtype == int
    else:
        assert set(read.columns) == set(columns)


def test_a_zip_or_the_folder_above_is_the_same(edition):
    packed = edition.parent / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("__MACOSX/._x", "")
        for file in edition.iterdir():
            archive.write(file, f"{edition.name}/{file.name}")
    folder = movielens.read_movielens(edition)
    pd.testing.assert_frame_equal(movielens.read_movielens(packed), folder)
    pd.testing.assert_frame_equal(movielens.read_movielens(str(edition.parent)), folder)


def test_the_newest_ratings_are_the_last_of_all(edition):
    every = movielens.read_movielens(edition)
    kept = movielens.read_movielens(edition, newest=2)
    assert kept["timestamp"].tolist() == every["timestamp"].tolist()[-2:] == [300, 400]


@pytest.mark.parametrize(
    ("title", "name", "year"),
    [
        ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975),
        ("Lovebirds, The (2006– )", "Lovebirds, The", 2006),
        ("Balto II (2002) (V)", "Balto II", 2002),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
        ("1984", "1984", None),
        ("Seven (a.k.a. Se7en) (1995)  ", "Seven (a.k.a. Se7en)", 1995),
        ("NA (2010)", "NA", 2010),
    ],
)
def test_the_year_stands_at_the_end_of_a_title(tmp_path, title, name, year):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,0.5,7\n")
    (tmp_path / "movies.csv").write_text(
        f'movieId,title,genres\n1,"{title}",IMAX\n', encoding="utf-8"
    )
    read = movielens.read_movielens(tmp_path)
    assert read["title"].tolist() == [name] and read["genres"].tolist() == [["IMAX"]]
    assert read["year"].fillna(0).tolist() == [year or 0]


def test_what_is_no_edition_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        movielens.read_movielens(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no MovieLens edition"):
        movielens.read_movielens(tmp_path)
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="cut.zip is neither a folder nor a whole zip"):
        movielens.read_movielens(tmp_path / "cut.zip")


def test_a_damaged_edition_is_refused_by_the_files_name(edition):
    films = next(
        file for file in edition.iterdir() if file.name in ("u.item", "movies.dat", "movies.csv")
    )
    whole = films.read_bytes()
    films.write_bytes(whole + b"12\n")
    with pytest.raises(ValueError, match=f"{films.name} is damaged: row 7"):
        movielens.read_movielens(edition)
    films.write_bytes(b"\n".join(whole.split(b"\n")[:-2]) + b"\n")  # without the last film
    with pytest.raises(ValueError, match="item_id 11"):
        movielens.read_movielens(edition)
    films.unlink()
    with pytest.raises(FileNotFoundError, match=films.name):
        movielens.read_movielens(edition)


@pytest.mark.parametrize("line", ["3,2", "3,2,four,100", "3,2,5,100,1,1"])
def test_a_damaged_rating_is_refused_by_the_files_name(tmp_path, line):
    write_latest(tmp_path)
    with open(tmp_path / "ratings.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"ratings\.csv is damaged"):
        movielens.read_movielens(tmp_path)
