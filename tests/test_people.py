"""Section 10: bags, films not liked, lists and knob, against loops; the benchmark's measures."""

import re

import numpy as np
import pandas as pd
import polars
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import people
from conftest import ROOT
from data import movielens
from dlrm_utils import FrameEncoder

COLUMNS = people.COLUMNS
NOTEBOOK = (ROOT / "DLRM.ipynb").read_text(encoding="utf-8")
some_likes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), max_size=60, unique=True)


def frame_of(likes):
    return pd.DataFrame(likes, columns=["user_id", "title"]).astype({"title": str})


@pytest.fixture(scope="module")
def made_up(notebook):
    """Toy ratings, their likes, films, what is asked, and a model of it."""
    ratings = movielens.toy_ratings(4_000)
    likes = ratings[ratings["rating"] >= 4].drop_duplicates(["user_id", "title"])
    films = notebook.films_of(likes)
    likes = likes[likes["title"].isin(films["title"])]
    asked = notebook.beside_others(notebook.with_bags(likes), films, ratings)
    encoder = FrameEncoder(**COLUMNS).fit(asked)
    torch.manual_seed(0)
    model = notebook.DLRM(encoder.table_sizes, 8, [8], [32], num_dense=1)
    batch = encoder.transform(asked)
    notebook.fit(model, notebook.adagrad(model), batch.take, len(asked))  # no two films are equal
    return ratings, likes, films, asked, model, encoder


# ---- Examples --------------------------------------------------------------------------------


def test_films_are_those_liked_five_times_the_most_liked_first(notebook, made_up):
    _, likes, films, *_ = made_up
    counts = {}
    for title in likes["title"]:
        counts[title] = counts.get(title, 0) + 1
    assert dict(zip(films["title"], films["likes"], strict=True)) == {
        title: count for title, count in counts.items() if count >= 5
    }
    assert films["likes"].is_monotonic_decreasing
    for row in films.itertuples():
        of_it = likes[likes["title"] == row.title].iloc[0]
        assert (row.year, row.genres) == (of_it["year"], of_it["genres"])


@given(some_likes, st.integers(0, 5))
def test_a_bag_holds_up_to_ten_of_her_other_likes(notebook, likes, seed):
    asked = notebook.with_bags(frame_of(likes), seed)
    assert sorted(zip(asked["user_id"], asked["title"], strict=True)) == sorted(
        (person, str(film)) for person, film in likes
    )
    assert (asked["click"] == 1).all()
    for row in asked.itertuples():
        hers = {str(film) for person, film in likes if person == row.user_id}
        assert len(row.liked) == len(set(row.liked)) <= 10
        assert set(row.liked) <= hers - {row.title}


def test_bags_are_of_all_lengths_and_of_all_her_films(notebook):
    likes = frame_of([(1, film) for film in range(40)] * 1)
    asked = pd.concat([notebook.with_bags(likes, seed) for seed in range(20)])
    lengths = asked["liked"].str.len().value_counts(normalize=True)
    assert set(lengths.index) <= set(range(11))
    assert lengths.loc[1:10].between(0.06, 0.14).all()
    drawn = asked["liked"].explode().value_counts()
    assert len(drawn) == 40 and drawn.max() < 2 * drawn.min()


def test_the_four_beside_a_like_are_films_she_has_not_rated(notebook, made_up):
    ratings, likes, films, asked, *_ = made_up
    liked = notebook.with_bags(likes)
    assert asked["click"].tolist()[: len(liked)] == [1] * len(liked)
    pd.testing.assert_frame_equal(
        asked[: len(liked)][["user_id", "title", "liked"]], liked[["user_id", "title", "liked"]]
    )
    others = asked[asked["click"] == 0]
    rated = ratings.groupby("user_id")["title"].agg(set)
    assert all(row.title not in rated[row.user_id] for row in others.itertuples())
    assert all(row.title not in row.liked for row in others.itertuples())
    bags = {(row.user_id, tuple(row.liked)) for row in liked.itertuples()}
    assert all((row.user_id, tuple(row.liked)) in bags for row in others.itertuples())
    columns = films.set_index("title")
    for row in asked.itertuples():
        film = columns.loc[row.title]
        assert (row.year, row.genres, row.likes) == (film["year"], film["genres"], film["likes"])


def test_films_are_drawn_as_often_as_they_are_liked(notebook, made_up):
    _, likes, films, *_ = made_up
    liked = notebook.with_bags(likes)
    beside = notebook.beside_others(liked, films, pd.DataFrame({"user_id": [], "title": []}), 3)
    drawn = beside[beside["click"] == 0]["title"].value_counts()
    assert drawn.sum() == 4 * len(liked)  # who has rated nothing loses none
    expected = films.set_index("title")["likes"] / films["likes"].sum() * drawn.sum()
    chi_square = ((drawn.reindex(expected.index).fillna(0) - expected) ** 2 / expected).sum()
    assert abs(chi_square - len(films)) < 5 * np.sqrt(2 * len(films))
    evenly = pd.Series(drawn.sum() / len(films), expected.index)
    assert ((drawn.reindex(evenly.index).fillna(0) - evenly) ** 2 / evenly).sum() > 2 * len(films)


def test_the_index_of_a_frame_does_not_matter(notebook, made_up):
    ratings, likes, films, asked, *_ = made_up
    liked = notebook.with_bags(likes.set_index(np.zeros(len(likes), int)))
    again = notebook.beside_others(liked.set_index(np.zeros(len(liked), int)), films, ratings)
    pd.testing.assert_frame_equal(again, asked)


# ---- The list --------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", [0, 0.5, 3])
def test_the_list_is_the_ten_highest_of_logit_and_knob(notebook, made_up, knob):
    *_, films, _, model, encoder = made_up
    liked = films["title"].tolist()[1:4]
    scores = {}
    for row in films.itertuples():
        one = pd.DataFrame({"year": [row.year], "title": [row.title], "genres": [row.genres]})
        logit = model(*encoder.transform(one.assign(liked=[liked]))[:3]).item()
        scores[row.title] = logit + knob * np.log(row.likes)
    expected = sorted(set(scores) - set(liked), key=scores.get, reverse=True)[:10]
    assert notebook.recommend(model, encoder, films, liked, knob) == expected


def test_the_list_follows_the_bag_the_year_and_the_genres(notebook, made_up):
    """Of a model that hears one input alone, a list that leaves it out is a list of ties."""
    *_, films, _, _, encoder = made_up
    bag = films["title"].tolist()[:2]

    class ByYear(torch.nn.Module):
        def forward(self, dense, indices, offsets):
            return dense[:, 0]

    class ByGenres(torch.nn.Module):
        def forward(self, dense, indices, offsets):
            return torch.diff(offsets[1], append=torch.tensor([len(indices[1])])).float()

    left = films[~films["title"].isin(bag)].reset_index(drop=True)
    newest = left.nlargest(10, "year")["title"].tolist()
    assert notebook.recommend(ByYear(), encoder, films, bag) == newest
    most = left.assign(n=left["genres"].str.len()).nlargest(10, "n")["title"].tolist()
    assert notebook.recommend(ByGenres(), encoder, films, bag) == most


def test_frames_of_polars_and_any_index_give_the_same_list(notebook, made_up):
    *_, films, _, model, encoder = made_up
    liked = films["title"].tolist()[:3]
    expected = notebook.recommend(model, encoder, films, liked, 0.5)
    in_polars = polars.DataFrame({name: films[name].to_list() for name in films.columns})
    assert notebook.recommend(model, encoder, in_polars, in_polars["title"][:3], 0.5) == expected
    repeated = films.set_index(np.zeros(len(films), int))
    assert notebook.recommend(model, encoder, repeated, tuple(liked), 0.5) == expected


def test_unknown_films_are_named_and_left_out(notebook, made_up, capsys):
    *_, films, _, model, encoder = made_up
    liked = films["title"].tolist()[:2]
    expected = notebook.recommend(model, encoder, films, liked)
    assert capsys.readouterr().out == ""
    found = notebook.recommend(model, encoder, films, ["The Matrix", *liked])
    assert found == expected and "The Matrix" in capsys.readouterr().out
    empty = notebook.recommend(model, encoder, films, [])
    assert notebook.recommend(model, encoder, films, ["The Matrix"]) == empty
    assert len(empty) == 10


# ---- Real people -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(notebook):
    """Section 10's model of MovieLens-100K, and its encoder; some ten seconds."""
    asked = people.asked_of(people.people(), people.SETTINGS, 0)
    return people.trained("DLRM", asked, people.SETTINGS, 0)


@pytest.mark.slow  # it trains section 10's model
def test_every_input_counts(real):
    group = people.people()
    liked = people.notebook.with_bags(group.likes_of(group.new))
    rows = people.beside(liked, group, 4, 0)
    model, encoder = real
    labels = rows["click"].to_numpy()

    def losses(rows):
        chances = people.notebook.predict(model, encoder.transform(rows))
        return -np.log(np.where(labels == 1, chances, 1 - chances))

    order = np.random.default_rng(0).permutation(len(rows))
    for name in ("year", "title", "genres", "liked"):
        dealt = rows.assign(**{name: rows[name].iloc[order].to_list()})
        rise = losses(dealt) - losses(rows)
        assert rise.mean() > 2 * rise.std() / len(rows) ** 0.5, name
        assert rise.mean() > 0.005, name


@pytest.mark.slow  # it scores every film for every newcomer
def test_her_own_bag_finds_more_than_popularity_and_anothers_less(real):
    tests, films = people.newcomers(), people.people().films
    logs = people.log_likes(films)
    other = [one._replace(bag=two.bag) for one, two in zip(tests, [*tests[1:], tests[0]])]
    own, strange = (people.scores_of(*real, bags, films) + 0.5 * logs for bags in (tests, other))
    known = people.judged(np.tile(logs, (len(tests), 1)), tests, films)["liked of ten"]
    assert people.judged(own, tests, films)["liked of ten"] > known + 0.5
    assert people.judged(strange, other, films)["liked of ten"] < known
    ten = people.notebook.recommend(*real, films, tests[5].bag, 0.5)
    assert ten == films["title"][np.argsort(np.where(
        films["title"].isin(tests[5].bag), np.inf, -own[5]))[:10]].tolist()  # fmt: skip


# ---- The benchmark ---------------------------------------------------------------------------


def test_groups_are_apart_and_in_order_of_arrival():
    group = people.people()
    first = group.ratings.groupby("user_id")["timestamp"].min()
    assert first[group.old].max() <= first[group.middle].min()
    assert first[group.middle].max() <= first[group.new].min()
    together = np.concatenate([group.old, group.middle, group.new])
    assert len(together) == len(set(together)) == 943


def test_settings_are_chosen_by_the_middle_tenth_with_full_bags(monkeypatch):
    """Whatever judges a setting is asked about the people between, none of them emptied."""
    asked = []

    def judged(scores, tests, films, among=None):
        asked.extend(tests)
        return {"liked of ten": 0.0, "standard error": 1.0, "different films": 0}

    monkeypatch.setattr(people, "judged", judged)
    monkeypatch.setattr(people, "asked_of", lambda *_: None)
    monkeypatch.setattr(people, "trained", lambda *_: (None, None))
    monkeypatch.setattr(people, "scores_of", lambda *_: 0.0)
    people.tried("DLRM", "rate", 0.1, 0)
    people.tried_ease()
    group = people.people()
    assert {test.person for test in asked} <= set(group.middle)
    assert len({test.person for test in asked}) > 80
    likes = group.likes.groupby("user_id")["title"].agg(set)
    for test in asked:
        assert test.bag and test.hidden and not set(test.bag) & test.hidden
        assert set(test.bag) | test.hidden <= likes[test.person]


@pytest.mark.parametrize("length", people.LENGTHS)
def test_a_newcomers_bag_is_known_and_the_rest_hidden(length):
    group = people.people()
    longest = {test.person: test for test in people.newcomers()}
    for test in people.newcomers(length):
        hers = set(group.likes.loc[group.likes["user_id"] == test.person, "title"])
        assert test.person in set(group.new)
        assert test.hidden == longest[test.person].hidden
        assert test.bag == longest[test.person].bag[:length]
        assert set(longest[test.person].bag) | test.hidden == hers


def test_liked_films_are_counted_as_by_hand():
    films = pd.DataFrame({"title": [f"f{k}" for k in range(30)]})
    tests = [people.Newcomer(1, ["f29"], {"f28", "f20", "f19", "f18"})] * 2
    scores = np.array([np.arange(30.0)] * 2)
    found = people.judged(scores, tests, films)  # f28 to f19 are listed
    assert found == {"liked of ten": 3, "standard error": 0, "different films": 10}
    among = np.arange(30) < 20  # f19 to f10
    assert people.judged(scores, tests, films, among)["liked of ten"] == 2


@pytest.mark.parametrize("same", [0.0, np.nan, -np.inf])
def test_ties_and_nan_count_against_a_model(same):
    films = pd.DataFrame({"title": [f"f{k}" for k in range(30)]})
    tests = [people.Newcomer(1, ["f9"], {"f0", "f1"})]
    assert people.judged(np.full((1, 30), same), tests, films)["liked of ten"] == 0
    one = np.arange(30.0)[None]
    one[0, 0] = np.nan  # a film that she likes
    assert people.judged(one, tests, films)["liked of ten"] == 0
    assert people.hits(np.full((1, 30), same), [0], [[]]) == [0]


def test_hits_are_counted_as_by_hand():
    scores = np.array([np.arange(30.0)] * 4)
    found = people.hits(scores, [20, 19, 19, 25], [[], [], [29], [25]])
    assert found.tolist() == [1, 0, 1, 0]  # nine ahead, ten, nine that she hadn't rated; rated


def test_the_error_is_that_of_people_not_of_likes():
    """If each person has one like, it is the standard error of a mean."""
    found = np.array([1.0, 0, 0, 1, 1, 0, 0, 0])
    share, error = people.share_and_error(found, np.arange(8))
    assert share == found.mean()
    assert error == pytest.approx(found.std(ddof=1) / np.sqrt(8))
    doubled = people.share_and_error(found.repeat(2), np.arange(8).repeat(2))
    assert doubled == pytest.approx((share, error))


def test_ease_is_the_least_squares_that_its_formula_says(notebook):
    """Column by column: each film by the others, its own weight held at 0."""
    rng = np.random.default_rng(0)
    seen = (rng.random((60, 6)) < 0.4).astype(float)
    weights = notebook.ease(seen, 3.0)
    for film in range(6):
        others = np.delete(np.arange(6), film)
        a = seen[:, others]
        alone = np.linalg.solve(a.T @ a + 3 * np.eye(5), a.T @ seen[:, film])
        assert np.allclose(np.delete(weights[:, film], film), alone)
        assert weights[film, film] == 0


@pytest.mark.parametrize("order", ["the site's", "random"])
def test_a_bag_of_next_holds_the_ten_before(order):
    rows = [(1, f"f{k}", k // 2) for k in range(30)]  # two films a second
    likes = pd.DataFrame(rows, columns=["user_id", "title", "timestamp"])
    asked = people.ordered(likes, order, 0)
    for row in asked.itertuples():
        assert row.title not in row.before and row.liked == row.before[-10:]
        if order == "the site's":
            k = int(row.title[1:])
            assert row.before == [f"f{j}" for j in range(k // 2 * 2)]
    assert len(asked) == (28 if order == "the site's" else 29)


def test_the_first_setting_stays_unless_another_is_clearly_better():
    rows = pd.DataFrame({
        "model": ["A", "A", "B", "B"], "setting": ["x 1", "x 2"] * 2, "knob": [0, 1, 0, 1],
        "liked of ten": [3.0, 3.1, 3.0, 3.5], "standard error": 0.2,
    })  # fmt: skip
    assert people.chosen(rows) == {"A": ("x 1", 0.0), "B": ("x 2", 1.0)}


# ---- What the texts say of the stored table --------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return pd.read_csv(ROOT / "figures/measured/people.csv")


def of(stored, question, model, value="liked of ten", **fixed):
    """A question's numbers, one a seed."""
    rows = stored[(stored["question"] == question) & (stored["model"] == model)]
    for name, kept in fixed.items():
        rows = rows[rows[name] == kept]
    assert len(rows)
    return rows[value]


def test_section_10_on_the_knob(stored):
    """Nearly three, about four from 0.5 on, about three at 0; another's bag finds less."""
    known = of(stored, "knob", "popularity").item()
    assert 2.5 < known < 3
    for knob in (0.5, 0.75, 1):
        assert of(stored, "knob", "DLRM", knob=knob).between(3.6, 4.4).all()
    assert of(stored, "knob", "DLRM", knob=0).between(2.5, 3.7).all()
    shown = [of(stored, "knob", "DLRM", "different films", knob=knob).mean()
             for knob in people.KNOBS]  # fmt: skip
    assert shown == sorted(shown, reverse=True)
    assert (of(stored, "knob", "another's bag") < known).all()


def test_appendix_h_on_the_rivals(stored):
    ease = of(stored, "rivals", "EASE").item()
    names = ["DLRM", "matrix factorization", "plain MLP"]
    means = pd.Series({name: of(stored, "rivals", name).mean() for name in names})
    assert 4.25 < ease < 4.75  # "four and a half"
    assert round(ease - means["DLRM"], 1) == 0.4
    assert np.ptp(means) < 0.2
    assert means.min() > of(stored, "rivals", "popularity").item() + 0.5
    few = "fewer than 40 likes"
    assert (of(stored, few, "DLRM") <= of(stored, few, "EASE").item()).all()
    assert (of(stored, few, "DLRM") > of(stored, few, "popularity").item()).all()


def test_appendix_h_on_short_bags_and_columns_that_ease_cannot_read(stored):
    question, more = "films in the bag", "DLRM, age, gender, occupation"
    by_length = {
        name: [of(stored, question, name, bag=length).mean() for length in people.LENGTHS]
        for name in ("DLRM", more, "EASE", "popularity")
    }
    assert abs(of(stored, question, "DLRM", bag=0).mean() - by_length["popularity"][0]) < 0.3
    assert by_length["DLRM"] == sorted(by_length["DLRM"])
    gains = np.subtract(by_length[more], by_length["DLRM"])
    assert np.abs(gains).max() < 0.1
    behind = np.subtract(by_length["EASE"], by_length["DLRM"])
    assert behind[:4].max() < 0.25 and behind[4] > 0.3


def test_appendix_h_on_next_new_films_and_inputs(stored):
    for name in ("DLRM, knob 0", "DLRM, knob 1"):
        site = of(stored, "next, in the site's order", name, "share found")
        random = of(stored, "next, in random order", name, "share found")
        assert site.mean() > random.mean() + 0.005
    auc = {name: of(stored, "new films", name, "auc").mean()
           for name in ("DLRM", "genres in common", "popularity, EASE")}  # fmt: skip
    assert auc["DLRM"] > auc["genres in common"] + 0.02 > 0.6
    assert auc["popularity, EASE"] == 0.5
    for name in ("year", "title", "genres", "liked"):
        assert (of(stored, "shuffled", name, "rise") > 0.01).all()


def test_the_notebooks_settings_are_those_that_were_chosen(stored):
    """On the middle tenth of people; section 10's cell is what `SETTINGS` says."""
    best = people.chosen(stored[stored["question"] == "settings"])
    assert best["DLRM"][0] == "width 32"
    ease = stored[stored["question"] == "settings of EASE"].set_index("bag").loc[10]
    assert f"ease(seen.to_numpy(), {int(ease['setting'].split()[1]):_})" in NOTEBOOK
    for name, (setting, knob) in (best | {"EASE": (ease["setting"], ease["knob"])}).items():
        kept = stored[(stored["question"] == "rivals") & (stored["model"] == name)]
        assert set(kept["setting"]) == {setting} and set(kept["knob"]) == {knob}
    assert "DLRM(people_encoder.table_sizes, 32, [16], [32], num_dense=1)" in NOTEBOOK
    assert "adagrad(people_model, 0.05)" in NOTEBOOK and "len(asked), 256, epochs=2" in NOTEBOOK


def test_the_readme_recipe_lists_ten_items(tmp_path, monkeypatch, capsys):
    """As it stands, on a small file of ratings under the name that it uses."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    recipe = [block for block in blocks if "beside_others" in block]
    if not recipe:
        pytest.skip("README has no recipe for one's own ratings")
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.integers(0, [60, 80, 6, 9999], (3000, 4)))
    rows.columns = ["userId", "itemId", "rating", "timestamp"]
    rows.to_csv(tmp_path / "ratings.csv", index=False)
    monkeypatch.chdir(tmp_path)
    exec(recipe[0], {})
    listed = eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(listed) == len(set(listed)) == 10 and set(listed) <= set(range(80))
