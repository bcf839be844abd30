"""MovieLens: real people's ratings of films. The 100K edition is fetched, any other is read."""

import csv
import hashlib
import itertools
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

WHEEL = "recbole-1.2.1-py3-none-any.whl"
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
RATING = {"user_id": "int64", "item_id": "int64", "rating": "float64", "timestamp": "int64"}
GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"]
GENRES += ["Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"]
GENRES += ["Romance", "Sci-Fi", "Thriller", "War", "Western"]  # the 100K edition's last columns
FILM, PERSON = ["item_id", "title", "genres"], ["gender", "occupation", "zip_code"]
# 'Toy Story (1995)', 'Fawlty Towers (1975-1979)', 'Balto II (2002) (V)'
YEAR = r"\s*\((\d{4})\s*(?:[-–]\s*\d*\s*)?\)(?:\s*\(V\))?\s*$"


def fetch_movielens(folder="data"):
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, one row a rating, by time.

    user_id, item_id, rating (1 to 5), timestamp, age, gender, occupation, zip_code, title, year,
    genres (a list). pip downloads it into folder at first use, or ConnectionError.
    """
    wheel = Path(folder) / WHEEL
    if not wheel.exists():
        _download(folder)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{wheel} is not as published; delete it and call this again")
    ratings, people, films = (_from_wheel(wheel, name) for name in ("inter", "user", "item"))
    films = films.rename(columns={"movie_title": "title", "class": "genres"})
    films["year"] = pd.to_numeric(films.pop("release_year"), errors="coerce")
    films["genres"] = films["genres"].str.split(" ")
    return _joined(ratings.astype(RATING | {"rating": int}), people, films)


def read_movielens(path, newest=None):
    """The folder or zip of any MovieLens edition: 100K, 1M, 10M, 20M, 25M, 32M or latest, by time.

    The columns of `fetch_movielens`, those of people where the edition has them (1M gives groups
    of ages, by their youngest). Stars may be halves. newest: keep so many of the newest ratings.
    FileNotFoundError if no edition is there, ValueError that names a file that is damaged.
    """
    folder, read = _edition(Path(path))
    return _joined(*read(folder), newest)


def _joined(ratings, people, films, newest=None):
    """One row a rating, by time. Of films with one title but several years, the year tells."""
    ratings = ratings.sort_values(["timestamp", "user_id", "item_id"], ignore_index=True)
    ratings = ratings.tail(newest or len(ratings))
    several = films.groupby("title")["year"].transform("nunique") > 1
    dated = films["title"] + films["year"].map(" ({:.0f})".format)
    films["title"] = dated.where(several & films["year"].notna(), films["title"])
    for table in [films] if people is None else [people, films]:
        key = table.columns[0]
        if lost := set(ratings[key].unique()) - set(table[key]):
            raise ValueError(f"{key} {min(lost)} is in the ratings, but in no row of its own")
        ratings = ratings.merge(table, on=key)
    return ratings


def _download(folder):
    """Into a folder of its own first, for two runs at once. The wheel is never installed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--dest", own, "recbole==1.2.1"]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            raise ConnectionError(f"MovieLens needs a network once (data/README.md): {pip.stderr}")
        (Path(own) / WHEEL).replace(Path(folder) / WHEEL)


def _from_wheel(wheel, name):
    """One of its three tables, whose headers are like user_id:token."""
    path = f"recbole/dataset_example/ml-100k/ml-100k.{name}"
    with zipfile.ZipFile(wheel) as archive, archive.open(path) as file:
        table = pd.read_csv(file, sep="\t", quoting=csv.QUOTE_NONE)
    return table.rename(columns=lambda header: header.split(":")[0])


def _edition(path):
    """Where its files lie, on disk or in a zip, and the function that reads them."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name a MovieLens folder or zip")
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a whole zip")
    top = path if path.is_dir() else zipfile.Path(path)
    readers = {"ratings.csv": _read_csv, "ratings.dat": _read_dat, "u.data": _read_100k}
    folders = [top, *(inner for inner in top.iterdir() if inner.is_dir())]
    for folder, name in itertools.product(folders, readers):
        if (folder / name).exists():
            return folder, readers[name]
    raise FileNotFoundError(f"{path} holds no MovieLens edition: none of {', '.join(readers)}")


def _read_100k(folder):
    ratings = _ratings(folder / "u.data", sep="\t", header=None)
    people = _rows(folder / "u.user", "|", ["user_id", "age", *PERSON])
    films = _rows(folder / "u.item", "|", [*FILM[:2], "released", "video", "address", *GENRES])
    flags = films[GENRES].to_numpy() == "1"
    films["genres"] = ["|".join(np.array(GENRES)[row]) for row in flags]
    return ratings.astype({"rating": int}), people.astype({"age": int}), _films(films)


def _read_dat(folder):
    # Cut at each ':' of '::', every other column is empty, and pandas is quick.
    ratings = _ratings(folder / "ratings.dat", sep=":", usecols=[0, 2, 4, 6], header=None)
    films = _films(_rows(folder / "movies.dat", "::", FILM))
    if not (folder / "users.dat").exists():  # 10M
        return ratings, None, films
    people = _rows(folder / "users.dat", "::", ["user_id", "gender", "age", *PERSON[1:]])
    return ratings.astype({"rating": int}), people.astype({"age": int}), films


def _read_csv(folder):
    return _ratings(folder / "ratings.csv"), None, _films(_rows(folder / "movies.csv", ",", FILM))


def _ratings(file, **options):
    try:
        with file.open("rb") as opened:
            return pd.read_csv(opened, **options).set_axis(list(RATING), axis=1).astype(RATING)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _rows(file, separator, columns):
    """A DataFrame of texts, whose first column is a number; a row of another length is named."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # the later editions
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # the older ones
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    if separator == ",":
        rows = list(csv.reader(lines))[1:]
    else:
        rows = [line.split(separator) for line in lines]
    for place, row in enumerate(rows, 1):
        if len(row) != len(columns) or not row[0].isdigit():
            raise ValueError(f"{file} is damaged: row {place} is {row}")
    return pd.DataFrame(rows, columns=columns).astype({columns[0]: int})


def _films(films):
    """item_id, title without its year, year (NaN where none stands), and genres as a list."""
    films["year"] = films["title"].str.extract(YEAR)[0].astype(float)
    films["title"] = films["title"].str.replace(YEAR, "", regex=True).str.strip()
    films["genres"] = films["genres"].replace("(no genres listed)", "").str.findall(r"[^|]+")
    return films[["item_id", "title", "year", "genres"]]


def toy_ratings(rows=12_000):
    """Random ratings with the columns of a later edition, for a machine without a network."""
    rng = np.random.default_rng(0)
    items = rng.integers(1, 300, rows)
    frame = pd.DataFrame({"item_id": items, "rating": rng.integers(1, 6, rows)})
    frame["user_id"] = rng.integers(1, 50, rows) + np.arange(rows) // 80  # people come and go
    frame["title"], frame["year"] = "Film " + frame["item_id"].astype(str), 1950.0 + items % 49
    frame["genres"] = [[["Comedy"], ["Horror"], ["Comedy", "Horror"]][item % 3] for item in items]
    return frame.assign(timestamp=range(rows))
