"""Section 10: bags of liked films, films not chosen, and lists, against loops; stored results."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import people
from conftest import ROOT
from data import movielens
from dlrm_utils import FrameEncoder, load_model, save_model

WIDTHS = {"embedding_dim": 4, "bottom_mlp": [3], "top_mlp": [5], "num_dense": 1}
rows_of_ratings = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4)),
    max_size=40,
)


@pytest.fixture(scope="module")
def made_up(notebook):
    """Toy ratings with bags, its films, and a model of them."""
    ratings = movielens.toy_ratings(3_000)
    ratings["click"] = (ratings["rating"] >= 4).astype(int)
    ratings["liked"] = notebook.liked_before(ratings)
    films = notebook.films_of(ratings)
    encoder = FrameEncoder(["age"], ["title"], ["genres", "liked"], "click").fit(ratings)
    torch.manual_seed(0)
    return ratings, films, notebook.DLRM(encoder.table_sizes, **WIDTHS), encoder


@settings(deadline=None)
@given(rows_of_ratings)
def test_a_bag_holds_ten_earlier_likes_and_nothing_of_the_same_second(notebook, rows):
    rows = sorted(rows, key=lambda row: row[3])
    frame = pd.DataFrame(rows, columns=["user_id", "title", "rating", "timestamp"])
    for n, bag in enumerate(notebook.liked_before(frame)):
        person, _, _, second = rows[n]
        before = [film for who, film, stars, when in rows[:n] if who == person and stars >= 4
                  and when < second]  # fmt: skip
        assert bag == before[-10:]


def test_films_are_those_liked_five_times_the_most_liked_first(notebook, made_up):
    ratings, films, _, _ = made_up
    likes = {}
    for title, click in zip(ratings["title"], ratings["click"], strict=True):
        likes[title] = likes.get(title, 0) + click
    assert dict(zip(films["title"], films["likes"], strict=True)) == {
        title: count for title, count in likes.items() if count >= 5
    }
    assert films["likes"].is_monotonic_decreasing


@pytest.mark.parametrize("weights", [None, "likes"])
def test_four_films_not_chosen_stand_beside_each_liked_one(notebook, made_up, weights):
    ratings, films, _, _ = made_up
    beside = notebook.beside_others(ratings, films, weights, seed=3)
    genres = dict(zip(films["title"], films["genres"], strict=True))
    liked = beside[beside["click"] == 1]
    others = beside[beside["click"] == 0]
    assert liked.index.tolist() == [
        n for n, row in ratings.iterrows() if row["click"] and row["title"] in genres
    ]
    assert others.index.tolist() == [n for n in liked.index for _ in range(4)]
    assert [genres[title] for title in others["title"]] == others["genres"].tolist()
    # How often a film was drawn: as often as any other, or as often as it is liked.
    share = films["likes"] / films["likes"].sum() if weights else 1 / len(films)
    expected = pd.Series(share * len(others)).repeat(len(films) // np.size(share)).to_numpy()
    drawn = others["title"].value_counts().reindex(films["title"], fill_value=0).to_numpy()
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert abs(chi_square - len(films)) < 5 * np.sqrt(2 * len(films))


def test_the_list_is_the_ten_highest_of_what_she_has_not_seen(notebook, made_up):
    _, films, model, encoder = made_up
    liked, seen = films["title"].tolist()[:3], films["title"].tolist()[5:9]
    logits = {}
    for row in films.itertuples():
        one = pd.DataFrame({"age": [np.nan], "title": [row.title], "genres": [row.genres]})
        logits[row.title] = model(*encoder.transform(one.assign(liked=[liked]))[:3]).item()
    expected = sorted(set(logits) - {*liked, *seen}, key=logits.get, reverse=True)[:10]
    assert notebook.recommend(model, encoder, films, liked, seen) == expected


@pytest.mark.slow  # a process of its own, which imports torch
def test_a_new_process_gives_the_same_list(notebook, made_up, tmp_path):
    _, films, model, encoder = made_up
    save_model(tmp_path / "model", {"class": "DLRM", **WIDTHS}, model, encoder)
    films.to_json(tmp_path / "films.json")
    program = (
        "import json, sys, dlrm_utils, pandas\n"
        "model, encoder = dlrm_utils.load_model(sys.argv[1])\n"
        "films = pandas.read_json(sys.argv[2])\n"
        "recommend = dlrm_utils.load_notebook().recommend\n"
        "print(json.dumps(recommend(model, encoder, films, sys.argv[3:])))"
    )
    liked = films["title"].tolist()[:2]
    places = [str(tmp_path / "model"), str(tmp_path / "films.json")]
    command = [sys.executable, "-c", program, *places, *liked]
    found = json.loads(subprocess.check_output(command, cwd=ROOT))
    assert found == notebook.recommend(model, encoder, films, liked)
    again, _ = load_model(tmp_path / "model")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


# ---- The benchmark ---------------------------------------------------------------------------


def test_hits_are_counted_as_by_hand():
    scores = np.array([np.arange(30.0), np.arange(30.0), np.arange(30.0)])
    found = people.hits(scores, [20, 19, 19], [[], [], [29]])
    assert found.tolist() == [1, 0, 1]  # nine, ten, and nine unseen films score higher


def test_the_error_is_that_of_people_not_of_likes():
    """If each person has one like, it is the standard error of a mean."""
    found = np.array([1.0, 0, 0, 1, 1, 0, 0, 0])
    share, error = people.share_and_error(found, np.arange(8))
    assert share == found.mean()
    assert error == pytest.approx(found.std(ddof=1) / np.sqrt(8))
    doubled = people.share_and_error(found.repeat(2), np.arange(8).repeat(2))
    assert doubled == pytest.approx((share, error))


def test_what_the_text_says_of_the_stored_runs():
    """Section 10: 8, 5, 17 and 10 % of hits; 600 films in place of 280; 18 % with both."""
    runs = pd.read_csv(ROOT / "figures/measured/people.csv")
    assert (runs.groupby(["model", "question"])["seed"].nunique().drop("popularity") == 10).all()
    means = runs.groupby(["question", "model"]).mean(numeric_only=True)
    stars, everything, popular = (means.loc[question] for question in people.QUESTIONS)
    assert round(100 * everything["hits"]["popularity"]) == 8
    assert (stars["hits"].drop("popularity") < stars["hits"]["popularity"] - 0.02).all()
    assert round(100 * everything["hits"]["DLRM"]) == 17
    assert round(100 * everything["hits_error"]["DLRM"], 1) == 1.4
    near = everything["hits"][["matrix factorization", "plain MLP"]]
    assert (everything["hits"]["DLRM"] - near < 2 * everything["hits_error"]["DLRM"]).all()
    assert (means["films_in_lists"].unstack()["logistic regression"] == 10).all()
    assert round(100 * popular["hits"]["DLRM"]) == 10
    assert popular["hits"].drop("DLRM").drop("popularity").max() < 0.075
    assert round(popular["films_in_lists"]["DLRM"], -2) == 600
    assert round(everything["films_in_lists"]["DLRM"], -1) == 280
    assert round(100 * popular["hits_with_log_likes"]["DLRM"]) == 18
