"""Which film did she like next? Section 10's questions to its rivals, ten seeds each.

Three questions make three training sets: four stars or more, and what a person liked next beside
films drawn evenly, or as often as they are liked. Rates are chosen on the middle tenth by log loss.
On the newest tenth: AUC among the question's own rows, and how often the film that a person liked
next is among the first ten of those that she hadn't rated. Standard errors are over people, since
one person's likes go together. Half an hour.
Writes figures/measured/people.csv.
"""

import functools
import sys

import numpy as np
import pandas as pd
import torch
from torch import nn

from shared import ROOT, in_parallel, notebook, save

sys.path.insert(0, str(ROOT))

import dlrm_utils  # noqa: E402
from data import movielens  # noqa: E402

RATES = [0.02, 0.05, 0.1]
SEEDS = range(10)
TESTS = 1_000  # likes of the newest tenth, drawn at random, that hits are counted on
QUESTIONS = ["four stars?", "next, of all films?", "next, of popular ones?"]
LIKED = 2  # the place of the bag among the tables: title, genres, liked
WIDTH = 16
COLUMNS = {
    "dense": ["age"],
    "categorical": ["title"],
    "multi_hot": ["genres", "liked"],
    "label": "click",
}


class MatrixFactorization(nn.Module):
    """Logistic regression and one dot product: that of the first table's and the last one's bag."""

    def __init__(self, table_sizes, embedding_dim, num_dense):
        super().__init__()
        self.tables = notebook.EmbeddingTables(table_sizes, embedding_dim)
        self.additive = notebook.LogisticRegression(table_sizes, num_dense)

    def forward(self, dense, indices, offsets):
        vectors = self.tables(indices, offsets)  # (B, T, D)
        match = (vectors[:, 0] * vectors[:, -1]).sum(1)  # film · bag, (B,)
        return self.additive(dense, indices, offsets) + match


def new_model(name, sizes):
    """A model of section 10 by its name."""
    if name == "logistic regression":
        return notebook.LogisticRegression(sizes, num_dense=1)
    if name == "matrix factorization":
        return MatrixFactorization(sizes, WIDTH, num_dense=1)
    if name == "plain MLP":
        return notebook.PlainMLP(sizes, WIDTH, [32], num_dense=1)
    return notebook.DLRM(sizes, WIDTH, [16], [32], num_dense=1)


MODELS = ["logistic regression", "matrix factorization", "plain MLP", "DLRM"]


@functools.cache
def people():
    """All ratings, the three parts of section 10, and the films that it recommends."""
    ratings = movielens.fetch_movielens(ROOT / "data")
    ratings["click"] = (ratings["rating"] >= 4).astype(int)
    ratings["liked"] = notebook.liked_before(ratings)
    rows = len(ratings)
    bounds = [0, rows * 8 // 10, rows * 9 // 10, rows]
    parts = [ratings[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    return ratings, parts, notebook.films_of(parts[0])


def rows_of(question, part, seed):
    """A question's rows of one part, a DataFrame."""
    _, parts, films = people()
    if question == "four stars?":
        return parts[part]
    weights = "likes" if question == "next, of popular ones?" else None
    return notebook.beside_others(parts[part], films, weights, seed)


def encoded(question, part, seed):
    """The same as a Batch."""
    return encoder().transform(rows_of(question, part, seed))


@functools.cache
def encoder():
    """Fitted on the training rows of the question that has all films."""
    return dlrm_utils.FrameEncoder(**COLUMNS).fit(rows_of("next, of all films?", 0, 0))


def trained(name, question, rate, seed):
    """The model after two epochs of section 8's loop."""
    batch = encoded(question, 0, seed)
    torch.manual_seed(seed)
    model = new_model(name, encoder().table_sizes)
    notebook.fit(model, notebook.adagrad(model, rate), batch.take, len(batch.labels), 256, 2)
    return model


@functools.cache
def chosen_tests():
    """Some likes of the newest tenth, their films' places, and those that a person had rated."""
    ratings, parts, films = people()
    likes = parts[2][(parts[2]["click"] == 1) & parts[2]["title"].isin(films["title"])]
    likes = likes.sample(min(TESTS, len(likes)), random_state=1)
    place = {title: k for k, title in enumerate(films["title"])}
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
    likes, _, _ = chosen_tests()
    _, _, films = people()
    batch = encoder().transform(likes)
    films = encoder().transform(films.assign(age=np.nan, liked=[[]] * len(films)))
    rows = range(len(likes))
    return np.stack([model(*every_film(batch, films, b)[:3]).numpy() for b in rows])


def choose(name, question, rate):
    """The log loss on the middle tenth."""
    model = trained(name, question, rate, 0)
    loss = notebook.evaluate(model, encoded(question, 1, 0))["log_loss"]
    return {"model": name, "question": question, "rate": rate, "log_loss": loss}


def run(name, question, rate, seed):
    """A row of the stored table."""
    model = trained(name, question, rate, seed)
    likes, wanted, rated = chosen_tests()
    scores = all_scores(model)
    _, _, films = people()
    share, error = share_and_error(hits(scores, wanted, rated), likes["user_id"].to_numpy())
    popular = hits(scores + np.log(films["likes"].to_numpy()), wanted, rated).mean()
    tops = {film for one in scores for film in np.argsort(-one)[:10]}
    return {
        "model": name,
        "question": question,
        "seed": seed,
        "rate": rate,
        "auc": notebook.evaluate(model, encoded(question, 2, 0))["auc"],
        "hits": share,
        "hits_error": error,
        "hits_with_log_likes": popular,
        "films_in_lists": len(tops),
    }


def popularity():
    """The same for the list that is the same for all: the most liked films."""
    likes, wanted, rated = chosen_tests()
    _, _, films = people()
    counts = films["likes"].to_numpy(float)
    scores = np.tile(counts, (len(likes), 1))
    share, error = share_and_error(hits(scores, wanted, rated), likes["user_id"].to_numpy())
    place = dict(zip(films["title"], counts, strict=True))
    rows = []
    for question in QUESTIONS:
        frame = rows_of(question, 2, 0)
        order = frame["title"].map(place).fillna(0).rank() / len(frame)
        auc = notebook.score(frame["click"], order)["auc"]
        rows.append({"model": "popularity", "question": question, "auc": auc})
    return [row | {"hits": share, "hits_error": error, "films_in_lists": 10} for row in rows]


def main():
    jobs = [(name, question, rate) for name in MODELS for question in QUESTIONS for rate in RATES]
    tried = pd.DataFrame(in_parallel(choose, jobs))
    best = tried.loc[tried.groupby(["model", "question"])["log_loss"].idxmin()]
    print(tried.pivot_table("log_loss", ["question", "model"], "rate").round(4))
    jobs = [
        (row.model, row.question, row.rate, seed) for row in best.itertuples() for seed in SEEDS
    ]
    runs = pd.DataFrame([*popularity(), *in_parallel(run, jobs)])
    columns = ["rate", "auc", "hits", "hits_error", "hits_with_log_likes", "films_in_lists"]
    grouped = runs.groupby(["question", "model"])
    print(grouped[columns].mean().join(grouped[["auc", "hits"]].std(), rsuffix=" sd").round(4))
    save(runs, "people", full_size=True)


if __name__ == "__main__":
    main()
