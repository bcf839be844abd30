"""MovieLens-100K: real people's ratings of films, fetched at first use.

The ratings lie as text in a wheel on the package registry; pip fetches it, nothing installs it.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

PACKAGE = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
TABLE = "recbole/dataset_example/ml-100k/ml-100k.{}"  # in the wheel: inter, user and item


def fetch_movielens(folder="data"):
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, one row a rating, by time.

    user_id, item_id, rating (1 to 5), timestamp, age, gender, occupation, zip_code, title, genres
    (a list), release_year. pip downloads it into folder at first use, or ConnectionError.
    """
    wheel = Path(folder) / WHEEL
    if not wheel.exists():
        _download(folder)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{wheel} is not as published; delete it and call this again")
    ratings, people, films = (_read(wheel, name) for name in ("inter", "user", "item"))
    films = films.rename(columns={"movie_title": "title", "class": "genres"})
    films["genres"] = films["genres"].str.split(" ")
    films["release_year"] = pd.to_numeric(films["release_year"], errors="coerce")
    frame = ratings.astype({"timestamp": int, "rating": int}).merge(people).merge(films)
    return frame.sort_values(["timestamp", "user_id", "item_id"], ignore_index=True)


def _download(folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--dest", folder, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConnectionError(
            f"MovieLens-100K needs a network once (data/README.md): {done.stderr}"
        )


def _read(wheel, name):
    """One of its three tables, whose headers are like user_id:token."""
    with zipfile.ZipFile(wheel) as archive, archive.open(TABLE.format(name)) as file:
        table = pd.read_csv(file, sep="\t", quoting=3)  # 3: a quotation mark is only a character
    return table.rename(columns=lambda header: header.split(":")[0])


def toy_ratings(rows=12_000):
    """Random ratings with the columns of `fetch_movielens`, for a machine without a network."""
    rng = np.random.default_rng(0)
    users = rng.integers(1, 50, rows) + np.arange(rows) // 80  # people come and go
    items = rng.integers(1, 300, rows)
    stars = rng.integers(1, 6, rows)
    frame = pd.DataFrame({"user_id": users, "item_id": items, "rating": stars})
    frame["genres"] = [[["Comedy"], ["Horror"], ["Comedy", "Horror"]][item % 3] for item in items]
    frame["title"] = "Film " + frame["item_id"].astype(str)
    frame["age"] = 18 + users % 50
    frame["gender"] = np.where(users % 3, "M", "F")
    frame["occupation"], frame["zip_code"], frame["release_year"] = "artist", "00000", 1990.0
    return frame.assign(timestamp=range(rows))
