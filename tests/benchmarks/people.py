"""Which other films does she like? Section 10's question to DLRM and its rivals, ten seeds each.

People are split by arrival: four fifths to learn from, a tenth to choose settings by, and the
newest tenth, newcomers whom no model has seen. A newcomer's bag holds ten of her likes (or half,
if she has fewer than twenty), the rest are hidden; a list of ten is judged by how many it finds.
Standard errors are over newcomers.
Half an hour. Writes figures/measured/people.csv; what a row asks is its column `question`.
"""

import functools
import sys
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from shared import ROOT, in_parallel, notebook, save

sys.path.insert(0, str(ROOT))

import dlrm_utils  # noqa: E402
from data import movielens  # noqa: E402

SEEDS = range(10)
KNOBS = [0, 0.25, 0.5, 0.75, 1]
LENGTHS = [1, 2, 3, 5, 10]
PENALTIES = [100, 300, 1000, 3000, 10_000]
EASE_KNOBS = [0, 0.005, 0.01, 0.02, 0.05]  # its scores are shares of a like, not logits
FEW = 40  # a film with fewer likes is little known
PERSON = ["age", "gender", "occupation"]  # what EASE can't read
NEW_FILM = "a new film"  # the name of all films that nobody has liked yet
COLUMNS = {
    "dense": ["year"],
    "categorical": ["title"],
    "multi_hot": ["genres", "liked"],
    "label": "click",
}
# The first tried, and what else was tried on the middle tenth of people, one at a time.
SETTINGS = {"rate": 0.05, "width": 16, "no-clicks": 4, "pooling": "sum", "epochs": 2}
OTHERS = {
    "rate": [0.02, 0.1],
    "width": [8, 32],
    "no-clicks": [1, 8],
    "pooling": ["mean"],
    "epochs": [1, 3, 4],
}


# ---- People, and what is asked of them -------------------------------------------------------


class People(NamedTuple):
    """All ratings; the likes of the films that section 10 recommends; and the three groups."""

    ratings: pd.DataFrame
    likes: pd.DataFrame
    films: pd.DataFrame
    old: np.ndarray
    middle: np.ndarray
    new: np.ndarray

    def likes_of(self, persons):
        return self.likes[self.likes["user_id"].isin(persons)]


class Newcomer(NamedTuple):
    """What is known of a person, and what is hidden."""

    person: int
    bag: list
    hidden: set


@functools.cache
def people():
    """MovieLens-100K as section 10 splits it."""
    ratings = movielens.fetch_movielens(ROOT / "data")
    return split(ratings)


def split(ratings):
    arrived = ratings["user_id"].unique()  # the ratings are in order of time
    old, middle, new = np.split(arrived, [len(arrived) * 8 // 10, len(arrived) * 9 // 10])
    likes = ratings[ratings["rating"] >= 4].drop_duplicates(["user_id", "title"])
    films = notebook.films_of(likes[likes["user_id"].isin(old)])
    likes = likes[likes["title"].isin(films["title"])]
    return People(ratings, likes, films, old, middle, new)


def hide(likes, length=10, draws=1):
    """Each person's bag of `length` films or fewer, and her other likes; several draws if asked.

    Who likes fewer than six films is left out. A shorter bag is the start of a longer one, and the
    same films are hidden.
    """
    hidden = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        for person, titles in likes.groupby("user_id")["title"]:
            titles = rng.permutation(titles.to_numpy(object))
            known = min(10, len(titles) // 2)
            if known >= 3:
                bag = titles[: min(known, length)].tolist()
                hidden.append(Newcomer(person, bag, set(titles[known:])))
    return hidden


def middle_tenth():
    """Those by whom settings are chosen: three draws of ten known films each."""
    return hide(people().likes_of(people().middle), draws=3)


def newcomers(length=10):
    """Those by whom models are judged."""
    return hide(people().likes_of(people().new), length)


def judged(scores, tests, films, among=None):
    """How many of ten listed films are liked, its standard error, and how many films are listed.

    scores: (tests, films). Films of the bag aren't listed, nor those outside `among`, a mask. A
    score of NaN is the lowest, and of equal ones those that she likes come last.
    """
    found, shown = [], set()
    titles = films["title"].to_numpy()
    for one, test in zip(scores, tests, strict=True):
        listed = ~np.isin(titles, test.bag) & (True if among is None else among)
        liked = np.isin(titles, list(test.hidden))
        order = np.lexsort((liked, -np.nan_to_num(one, nan=-np.inf), ~listed))
        ten = [k for k in order[:10] if listed[k]]
        found.append(liked[ten].sum())
        shown |= set(ten)
    return {
        "liked of ten": np.mean(found),
        "standard error": np.std(found, ddof=1) / len(found) ** 0.5,
        "different films": len(shown),
    }


# ---- Models ----------------------------------------------------------------------------------


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


def new_model(name, sizes, width, num_dense):
    """A model of section 10 by its name."""
    if name == "matrix factorization":
        return MatrixFactorization(sizes, width, num_dense)
    if name == "plain MLP":
        return notebook.PlainMLP(sizes, width, [32], num_dense)
    return notebook.DLRM(sizes, width, [16], [32], num_dense)


def asked_of(group, settings, seed):
    """A group's likes with bags, beside films that were drawn."""
    liked = notebook.with_bags(group.likes_of(group.old), seed)
    return beside(liked, group, settings["no-clicks"], seed)


def beside(liked, group, number, seed):
    """`beside_others` draws four; any other number is a share of several draws."""
    draws = -(-number // 4)
    rows = [
        notebook.beside_others(liked, group.films, group.ratings, seed + 100 * draw)
        for draw in range(draws)
    ]
    drawn = pd.concat([one[one["click"] == 0] for one in rows])
    drawn = drawn.sample(frac=number / (4 * draws), random_state=seed)
    return pd.concat([rows[0][rows[0]["click"] == 1], drawn], ignore_index=True)


def trained(name, asked, settings, seed, columns=COLUMNS):
    """(model, encoder) after section 8's loop over the rows asked."""
    encoder = dlrm_utils.FrameEncoder(**columns).fit(asked)
    batch = encoder.transform(asked)
    torch.manual_seed(seed)
    sizes, num_dense = encoder.table_sizes, len(columns["dense"])
    model = new_model(name, sizes, settings["width"], num_dense)
    if settings["pooling"] == "mean":
        model.tables[-1].mode = "mean"
    optimizer = notebook.adagrad(model, settings["rate"])
    notebook.fit(model, optimizer, batch.take, len(asked), 256, settings["epochs"])
    return model, encoder


@torch.no_grad()
def scores_of(model, encoder, tests, films, person=None):
    """Each test's logits of all films, (tests, films); `person`: columns of each, a DataFrame."""
    scores = []
    for start in range(0, len(tests), 50):  # spares memory
        part = tests[start : start + 50]
        rows = films.iloc[np.tile(np.arange(len(films)), len(part))]
        rows = rows.assign(liked=[test.bag for test in part for _ in range(len(films))])
        if person is not None:
            whose = np.repeat([test.person for test in part], len(films))
            rows = rows.assign(**{name: person.loc[whose, name].to_numpy() for name in person})
        logits = model(*encoder.transform(rows)[:3])
        scores.append(logits.numpy().reshape(len(part), len(films)))
    return np.concatenate(scores)


def ease_weights(group, penalty):
    """EASE of the people to learn from, (films, films)."""
    return notebook.ease(seen_of(group.likes_of(group.old), group.films), penalty)


def seen_of(likes, films):
    """1 where a person (row) likes a film (column)."""
    place = {title: k for k, title in enumerate(films["title"])}
    seen = np.zeros((likes["user_id"].nunique(), len(films)))
    seen[pd.factorize(likes["user_id"])[0], likes["title"].map(place)] = 1
    return seen


def ease_scores(weights, tests, films):
    place = {title: k for k, title in enumerate(films["title"])}
    return np.array([weights[[place[film] for film in test.bag]].sum(0) for test in tests])


# ---- Choosing, on the middle tenth -----------------------------------------------------------


def tried(name, changed, value, seed):
    """One setting changed: liked of ten at each knob, rows."""
    settings = SETTINGS | {changed: value}
    model, encoder = trained(name, asked_of(people(), settings, seed), settings, seed)
    tests, films = middle_tenth(), people().films
    scores = scores_of(model, encoder, tests, films)
    kept = {"question": "settings", "model": name, "setting": f"{changed} {value}", "seed": seed}
    return [
        kept | {"knob": knob} | judged(scores + knob * log_likes(films), tests, films)
        for knob in KNOBS
    ]


def log_likes(films):
    return np.log(films["likes"].to_numpy(float))


def tried_ease():
    """EASE's penalties and knobs at each length of bag: its formula is quick."""
    group, films, rows = people(), people().films, []
    for penalty in PENALTIES:
        weights = ease_weights(group, penalty)
        for length in LENGTHS:
            tests = hide(group.likes_of(group.middle), length, draws=3)
            scores = ease_scores(weights, tests, films)
            kept = {"question": "settings of EASE", "model": "EASE", "bag": length}
            for knob in EASE_KNOBS:
                found = judged(scores + knob * log_likes(films), tests, films)
                rows.append(kept | {"setting": f"penalty {penalty}", "knob": knob} | found)
    return pd.DataFrame(rows)


def best_ease(tried):
    """For each length of bag the row of `tried_ease` that found most."""
    return tried.loc[tried.groupby("bag")["liked of ten"].idxmax()]


def by_setting(rows):
    """The means over seeds, at the knob that found most: a row for each model and setting."""
    keys = ["question", "model", "setting", "knob"]
    means = pd.DataFrame(rows).groupby(keys, sort=False, as_index=False).mean()
    return means.loc[means.groupby(["model", "setting"], sort=False)["liked of ten"].idxmax()]


def chosen(settings):
    """For each model (setting, knob): the first that was tried, unless one is clearly better.

    settings: `by_setting`'s table. Clearly: by more than a standard error.
    """
    best = {}
    for name, rows in settings.groupby("model"):
        first, most = rows.iloc[0], rows.loc[rows["liked of ten"].idxmax()]
        clear = most["liked of ten"] - first["liked of ten"] > first["standard error"]
        kept = most if clear else first
        best[name] = (kept["setting"], float(kept["knob"]))
    return best


# ---- Judging, by newcomers -------------------------------------------------------------------


def run(seed, best):
    """All rows of one seed; best: each model's (setting, knob)."""
    group, tests = people(), newcomers()
    films, logs, rows = group.films, log_likes(group.films), []
    few = (films["likes"] < FEW).to_numpy()

    def add(question, model, scores, knob, tests=tests, among=None, **more):
        kept = {"question": question, "model": model, "knob": knob, "seed": seed, **more}
        rows.append(kept | judged(scores + knob * logs, tests, films, among))

    for name in ("matrix factorization", "plain MLP", "DLRM"):
        setting, knob = best[name]
        settings = SETTINGS | parsed(setting)
        model, encoder = trained(name, asked_of(group, settings, seed), settings, seed)
        scores = scores_of(model, encoder, tests, films)
        add("rivals", name, scores, knob, setting=setting)
        if name == "DLRM":
            dlrm = model, encoder, scores, knob
    model, encoder, scores, best_knob = dlrm
    for knob in KNOBS:
        add("knob", "DLRM", scores, knob)
    other = [one._replace(bag=two.bag) for one, two in zip(tests, [*tests[1:], tests[0]])]
    strange = scores_of(model, encoder, other, films)
    for knob in KNOBS:
        add("knob", "another's bag", strange, knob, other)
    add("fewer than 40 likes", "DLRM", scores, 0, among=few)
    add("fewer than 40 likes", "DLRM", scores, best_knob, among=few)
    for length in (0, *LENGTHS):
        shorter = newcomers(length)
        found = scores_of(model, encoder, shorter, films)
        add("films in the bag", "DLRM", found, best_knob, shorter, bag=length)
    rows += shuffled(model, encoder, seed)
    rows += with_columns(seed, best_knob) + new_films(seed)
    return rows + next_like(seed, "the site's") + next_like(seed, "random")


def shuffled(model, encoder, seed):
    """How much the newcomers' log loss rises when one column is dealt out anew."""
    group = people()
    liked = notebook.with_bags(group.likes_of(group.new), seed)
    rows = beside(liked, group, 4, seed)
    loss = notebook.evaluate(model, encoder.transform(rows))["log_loss"]
    order = np.random.default_rng(seed).permutation(len(rows))
    found = []
    for name in ("year", "title", "genres", "liked"):
        dealt = rows.assign(**{name: rows[name].iloc[order].to_list()})
        rise = notebook.evaluate(model, encoder.transform(dealt))["log_loss"] - loss
        found.append({"question": "shuffled", "model": name, "seed": seed, "rise": rise})
    return found


def parsed(setting):
    """'rate 0.1' as {"rate": 0.1}."""
    name, value = setting.split(" ")
    return {name: value if name == "pooling" else float(value) if name == "rate" else int(value)}


def with_columns(seed, knob):
    """DLRM that reads age, gender and occupation, too."""
    group = people()
    person = group.ratings.drop_duplicates("user_id").set_index("user_id")[PERSON]
    columns = COLUMNS | {"dense": ["year", "age"], "categorical": ["title", *PERSON[1:]]}
    asked = asked_of(group, SETTINGS, seed).join(person, on="user_id")
    model, encoder = trained("DLRM", asked, SETTINGS, seed, columns)
    rows = []
    for length in (0, *LENGTHS):
        tests = newcomers(length)
        scores = scores_of(model, encoder, tests, group.films, person)
        kept = {"question": "films in the bag", "model": "DLRM, age, gender, occupation"}
        kept |= {"knob": knob, "bag": length, "seed": seed}
        rows.append(kept | judged(scores + knob * log_likes(group.films), tests, group.films))
    return rows


def without_seed(ease):
    """Popularity and EASE, which draw nothing; ease: `best_ease`'s rows, the longest bag last."""
    films, rows = people().films, []
    for length, setting, knob in ease[["bag", "setting", "knob"]].itertuples(index=False):
        tests = newcomers(length)
        known = np.tile(log_likes(films), (len(tests), 1))
        weights = ease_weights(people(), int(setting.split(" ")[1]))
        scores = ease_scores(weights, tests, films) + knob * known
        ways = {"popularity": (known, {}), "EASE": (scores, {"setting": setting, "knob": knob})}
        for name, (one, kept) in ways.items():
            kept = {"question": "films in the bag", "model": name, "bag": length, **kept}
            rows.append(kept | judged(one, tests, films))
    for name, (one, kept) in ways.items():
        found = {"model": name, **kept} | judged(one, tests, films)
        rows.append({"question": "rivals"} | found)
        found |= judged(one, tests, films, (films["likes"] < FEW).to_numpy())
        rows.append({"question": "fewer than 40 likes"} | found)
    known = {"question": "knob", "model": "popularity", "knob": 1} | judged(known, tests, films)
    return [*rows, known]


# ---- Films that nobody has liked yet ---------------------------------------------------------


def new_films(seed):
    """A tenth of the films is new: does a person prefer the right ones, by genres and year?

    Training never sees them; one title in ten is hidden from it, so that 'a new film' is a name
    that it knows. Judged by AUC among the new films, where popularity and EASE can only guess.
    """
    group = people()
    is_new = np.random.default_rng(seed).random(len(group.films)) < 0.1
    fresh, known = group.films[is_new], group.films[~is_new]
    likes = group.likes[group.likes["title"].isin(known["title"])]
    asked = asked_of(group._replace(films=known, likes=likes), SETTINGS, seed)
    asked = asked.assign(title=asked["title"].astype(object))
    asked.loc[asked.sample(frac=0.1, random_state=seed).index, "title"] = NEW_FILM
    model, encoder = trained("DLRM", asked, SETTINGS, seed)
    tests = []
    for test in hide(likes[likes["user_id"].isin(group.new)]):
        hers = group.likes[group.likes["user_id"] == test.person]["title"]
        tests.append(test._replace(hidden=set(hers) & set(fresh["title"])))
    scores = scores_of(model, encoder, tests, fresh.assign(title=NEW_FILM))
    genres = group.films.set_index("title")["genres"]
    overlap = [
        [sum(len(set(own) & set(genres[film])) for film in test.bag) for own in fresh["genres"]]
        for test in tests
    ]
    ways = {"DLRM": scores, "genres in common": np.array(overlap, float)}
    ways["popularity, EASE"] = np.zeros_like(scores)
    return [
        {"question": "new films", "model": name, "seed": seed} | preferred(one, tests, fresh)
        for name, one in ways.items()
    ]


def preferred(scores, tests, films):
    """The mean over people of the AUC of her hidden films among these, and its standard error."""
    found = []
    for one, test in zip(scores, tests, strict=True):
        liked = films["title"].isin(test.hidden).to_numpy()
        if liked.any() and not liked.all():
            found.append(roc_auc_score(liked, one))
    return {"auc": np.mean(found), "standard error": np.std(found, ddof=1) / len(found) ** 0.5}


# ---- The trap of 'next' ----------------------------------------------------------------------


def ordered(likes, order, seed):
    """Each like, beside up to ten that came just before, in the site's or in a random order.

    `before` holds the places of all earlier ones. In the site's order, before means an earlier
    second, since several films are rated in one.
    """
    rng, rows = np.random.default_rng(seed), []
    for person, hers in likes.groupby("user_id"):
        titles, seconds = hers["title"].to_numpy(object), hers["timestamp"].to_numpy()
        if order == "random":
            titles, seconds = rng.permutation(titles), np.arange(len(titles))
        for title, second in zip(titles, seconds):
            before = titles[seconds < second].tolist()
            if before:
                rows.append((person, title, before[-10:], before, 1))
    return pd.DataFrame(rows, columns=["user_id", "title", "liked", "before", "click"])


def next_like(seed, order, tests=1_000):
    """How often is the film that she liked next among the first ten? DLRM's and popularity's."""
    group = people()
    logs = log_likes(group.films)
    liked = ordered(group.likes_of(group.old), order, seed)
    model, encoder = trained("DLRM", beside(liked, group, 4, seed), SETTINGS, seed)
    asked = ordered(group.likes_of(group.new), order, seed)
    asked = asked.sample(min(tests, len(asked)), random_state=1)
    as_tests = [Newcomer(row.user_id, row.liked, {row.title}) for row in asked.itertuples()]
    scores = scores_of(model, encoder, as_tests, group.films)
    place = {title: k for k, title in enumerate(group.films["title"])}
    wanted = asked["title"].map(place).to_numpy()
    before = [[place[title] for title in titles] for titles in asked["before"]]
    ways = {"DLRM, knob 0": scores, "DLRM, knob 1": scores + logs}
    ways["popularity"] = np.tile(logs, (len(scores), 1))
    rows = []
    for name, one in ways.items():
        share, error = share_and_error(hits(one, wanted, before), asked["user_id"].to_numpy())
        kept = {"question": f"next, in {order} order", "model": name, "seed": seed}
        rows.append(kept | {"share found": share, "standard error": error})
    return rows


def hits(scores, wanted, before):
    """1 where fewer than ten other films that aren't `before` score as high as the wanted one.

    A score of NaN loses to all, and a wanted film of NaN is not found.
    """
    found = []
    for one, place, earlier in zip(scores, wanted, before, strict=True):
        one = np.nan_to_num(one, nan=-np.inf)
        target = one[place]
        one[earlier] = -np.inf
        ahead = (one >= target).sum() - 1  # itself
        found.append(float(target > -np.inf and place not in earlier and ahead < 10))
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


def main():
    jobs = [("DLRM", "epochs", 2, 0)]
    jobs += [("DLRM", name, value, 0) for name in OTHERS for value in OTHERS[name]]
    for name in ("matrix factorization", "plain MLP"):
        jobs += [(name, "rate", value, 0) for value in (0.05, 0.02, 0.1, 0.2)]
        jobs += [(name, "epochs", value, 0) for value in (1, 3, 4)]
    rows = [row for rows in in_parallel(tried, jobs) for row in rows]
    settings = by_setting(rows).drop(columns="seed")
    best, ease = chosen(settings), best_ease(tried_ease())
    print(best, ease, sep="\n")
    runs = in_parallel(run, [(seed, best) for seed in SEEDS])
    found = pd.DataFrame([*without_seed(ease), *(row for rows in runs for row in rows)])
    columns = ["question", "model", "setting", "knob", "bag", "seed", "liked of ten"]
    columns += ["standard error", "different films", "auc", "share found", "rise"]
    table = pd.concat([settings, ease, found])[columns]
    kept = table.groupby(columns[:5], dropna=False, sort=False)[columns[6:]]
    print(kept.mean().round(3).to_string())
    save(table.round(4), "people", full_size=True)


if __name__ == "__main__":
    main()
