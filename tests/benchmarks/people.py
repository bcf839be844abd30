"""Which film did she like next? Section 10's question to its models, ten seeds each.

Two sources of the films she didn't choose: all evenly, or as often as they are liked. Rates are
chosen on the middle tenth by log loss. On the newest tenth: AUC among impressions, and how often
the film that a person liked next is among the first ten of those that she hadn't rated. Standard
errors are over people, since one person's likes go together. Some ten minutes.
Writes figures/measured/people.csv.
"""

import functools
import sys

import numpy as np
import pandas as pd
import torch

from shared import ROOT, in_parallel, notebook, save

sys.path.insert(0, str(ROOT))

import dlrm_utils  # noqa: E402
from data import movielens  # noqa: E402

RATES = [0.02, 0.05, 0.1]
SEEDS = range(10)
TESTS = 1_000  # likes of the newest tenth, drawn at random, that hits are counted on
SOURCES = {"of all films": False, "of popular films": True}
LIKED = 2  # the place of the bag among the tables: title, genres, liked
WIDTH = 16


def new_model(name, sizes):
    """A model of section 10 by its name."""
    if name == "logistic regression":
        return notebook.LogisticRegression(sizes, num_dense=1)
    if name == "matrix factorization":
        return notebook.MatrixFactorization(sizes, WIDTH, num_dense=1)
    if name == "plain MLP":
        return notebook.PlainMLP(sizes, WIDTH, [32], num_dense=1)
    return notebook.DLRM(sizes, WIDTH, [16], [32], num_dense=1)


MODELS = ["logistic regression", "matrix factorization", "plain MLP", "DLRM"]


@functools.cache
def people():
    """Section 10's parts and catalogue, and for each row what its person had rated before."""
    ratings = movielens.fetch_movielens(ROOT / "data")
    ratings["click"] = (ratings["rating"] >= 4).astype(int)
    ratings["liked"] = notebook.liked_before(ratings)
    bounds = [int(share * len(ratings)) for share in (0, 0.8, 0.9, 1)]
    parts = [ratings[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    catalogue = notebook.films_with_likes(parts[0])
    return ratings, parts, catalogue


def encoded(source, part, seed):
    """The impressions of a part as a Batch; the encoder is fitted on the training part's."""
    _, parts, catalogue = people()
    chances = catalogue["likes"] if SOURCES[source] else None
    frame = notebook.impressions(parts[part], catalogue, chances, seed)
    return encoder().transform(frame)


@functools.cache
def encoder():
    _, parts, catalogue = people()
    columns = {"dense": ["age"], "categorical": ["title"], "multi_hot": ["genres", "liked"]}
    frame = notebook.impressions(parts[0], catalogue, None, 0)
    return dlrm_utils.FrameEncoder(**columns, label="click").fit(frame)


def trained(name, source, rate, seed):
    """The model after two epochs of section 8's loop."""
    batch = encoded(source, 0, seed)
    torch.manual_seed(seed)
    model = new_model(name, encoder().table_sizes)
    notebook.fit(model, notebook.adagrad(model, rate), batch.take, len(batch.labels), 256, 2)
    return model


def chosen_tests():
    """Some likes of the newest tenth, and the places in the catalogue that a person had rated."""
    ratings, parts, catalogue = people()
    likes = parts[2][(parts[2]["click"] == 1) & parts[2]["title"].isin(catalogue["title"])]
    likes = likes.sample(min(TESTS, len(likes)), random_state=1)
    place = {title: k for k, title in enumerate(catalogue["title"])}
    rated = []
    for row in likes.itertuples():
        hers = ratings[(ratings["user_id"] == row.user_id) & (ratings["timestamp"] < row.timestamp)]
        rated.append([place[title] for title in hers["title"] if title in place])
    return likes, likes["title"].map(place).to_numpy(), rated


def every_film(batch, films, b):
    """Row b of a Batch with each film in turn: all films for one person."""
    count = len(films.dense)
    start = batch.offsets[LIKED][b]
    end = batch.offsets[LIKED][b + 1] if b + 1 < len(batch.dense) else len(batch.indices[LIKED])
    bag = batch.indices[LIKED][start:end]
    indices = [*films.indices[:LIKED], bag.repeat(count)]
    offsets = [*films.offsets[:LIKED], torch.arange(count) * len(bag)]
    return dlrm_utils.Batch(batch.dense[b].expand(count, -1), indices, offsets)


def hits(scores, wanted, rated):
    """1 where fewer than ten films that she hadn't rated score higher than the one she liked."""
    found = []
    for one, place, before in zip(scores, wanted, rated, strict=True):
        one = one.copy()
        target = one[place]
        one[before] = -np.inf
        found.append(float((one > target).sum() < 10 and place not in before))
    return np.array(found)


def share_and_error(found, persons):
    """The share of hits, and its standard error if people (not likes) are drawn at random."""
    by_person = pd.DataFrame({"person": persons, "hit": found}).groupby("person")["hit"]
    sums, counts = by_person.sum(), by_person.size()
    share = found.mean()
    residuals = sums - share * counts
    number = len(counts)
    error = np.sqrt((residuals**2).sum() * number / (number - 1)) / counts.sum()
    return share, error


@torch.no_grad()
def all_scores(model):
    """Each test's scores of all films, (tests, films)."""
    likes, _, _ = chosen_tests_once()
    _, _, catalogue = people()
    batch = encoder().transform(likes)
    films = encoder().transform(catalogue.assign(age=0, liked=[[]] * len(catalogue)))
    rows = range(len(likes))
    return np.stack([model(*every_film(batch, films, b)[:3]).numpy() for b in rows])


chosen_tests_once = functools.cache(chosen_tests)


def choose(name, source, rate):
    """The log loss on the middle tenth."""
    model = trained(name, source, rate, 0)
    loss = notebook.evaluate(model, encoded(source, 1, 0))["log_loss"]
    return {"model": name, "source": source, "rate": rate, "log_loss": loss}


def run(name, source, rate, seed):
    """A row of the stored table."""
    model = trained(name, source, rate, seed)
    likes, wanted, rated = chosen_tests_once()
    scores = all_scores(model)
    _, _, catalogue = people()
    share, error = share_and_error(hits(scores, wanted, rated), likes["user_id"].to_numpy())
    popular = hits(scores + np.log(catalogue["likes"].to_numpy()), wanted, rated).mean()
    tops = {film for one in scores for film in np.argsort(-one)[:10]}
    return {
        "model": name,
        "source": source,
        "seed": seed,
        "rate": rate,
        "auc": notebook.evaluate(model, encoded(source, 2, 0))["auc"],
        "hits": share,
        "hits_error": error,
        "hits_with_log_likes": popular,
        "films_in_lists": len(tops),
    }


def popularity():
    """The same for the list that is the same for all: the most liked films."""
    likes, wanted, rated = chosen_tests_once()
    _, _, catalogue = people()
    counts = catalogue["likes"].to_numpy(float)
    scores = np.tile(counts, (len(likes), 1))
    share, error = share_and_error(hits(scores, wanted, rated), likes["user_id"].to_numpy())
    place = dict(zip(catalogue["title"], counts, strict=True))
    rows = []
    for source in SOURCES:
        _, parts, _ = people()
        chances = catalogue["likes"] if SOURCES[source] else None
        frame = notebook.impressions(parts[2], catalogue, chances, 0)
        order = frame["title"].map(place).rank() / len(frame)
        auc = notebook.score(frame["click"], order)["auc"]
        rows.append({"model": "popularity", "source": source, "auc": auc})
    return [row | {"hits": share, "hits_error": error, "films_in_lists": 10} for row in rows]


def main():
    jobs = [(name, source, rate) for name in MODELS for source in SOURCES for rate in RATES]
    tried = pd.DataFrame(in_parallel(choose, jobs))
    best = tried.loc[tried.groupby(["model", "source"])["log_loss"].idxmin()]
    print(tried.pivot_table("log_loss", ["source", "model"], "rate").round(4))
    jobs = [(row.model, row.source, row.rate, seed) for row in best.itertuples() for seed in SEEDS]
    runs = pd.DataFrame([*popularity(), *in_parallel(run, jobs)])
    columns = ["rate", "auc", "hits", "hits_error", "hits_with_log_likes", "films_in_lists"]
    grouped = runs.groupby(["source", "model"])
    print(grouped[columns].mean().join(grouped[["auc", "hits"]].std(), rsuffix=" sd").round(4))
    save(runs, "people", full_size=True)


if __name__ == "__main__":
    main()
