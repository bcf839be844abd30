"""The closed loop: measures against definitions, recommenders and remedies against loops."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

import closed_loop
from closed_loop import REMEDIES, explore, rerank

torch.sparse.check_sparse_tensor_invariants.disable()
COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any).map(np.array)
RNG = np.random.default_rng(0)
SCORES, KINDS = RNG.normal(0, 1, (7, 15)), np.arange(15) % 4


@given(COUNTS)
def test_effective_number_is_e_to_the_entropy(notebook, counts):
    assert math.isclose(notebook.effective_number(counts), math.exp(entropy(counts)), rel_tol=1e-9)
    assert 1 - 1e-9 <= notebook.effective_number(counts) <= (counts > 0).sum() + 1e-9


def test_measures_by_counting(notebook):
    world = notebook.small_world(1, viewers=9, channels=12, num_kinds=3)
    slates = np.stack([RNG.permutation(12)[:4] for _ in range(9)])
    found = notebook.measures(world, slates)
    shown = [channel for slate in slates for channel in slate]
    of_kinds = [
        [sum(world.kinds[channel] == kind for channel in slate) for kind in range(3)]
        for slate in slates
    ]
    wanted = [world.probability[viewer, slate].sum() for viewer, slate in enumerate(slates)]
    expected = {
        "clicks": sum(wanted) / 9,
        "channels": math.exp(entropy([shown.count(channel) for channel in range(12)])),
        "kinds": sum(math.exp(entropy(counts)) for counts in of_kinds) / 9,
        "extremity": sum(world.extremity[channel] for channel in shown) / len(shown),
    }
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-9), name


def test_extremity_pulls_and_nothing_else_depends_on_it(notebook):
    calm, pulled = notebook.small_world(3, pull=0), notebook.small_world(3, pull=2)
    logit = [np.log(world.probability / (1 - world.probability)) for world in (calm, pulled)]
    assert np.allclose(logit[1] - logit[0], 2 * calm.extremity)  # the same for every viewer
    assert np.array_equal(calm.extremity, pulled.extremity) and np.array_equal(
        calm.kinds, pulled.kinds
    )


def greedy(scores, penalty, size):
    """Re-ranking of one viewer's scores, channel by channel."""
    slate = []
    while len(slate) < size:
        value = {
            channel: score - penalty * sum(KINDS[channel] == KINDS[taken] for taken in slate)
            for channel, score in enumerate(scores)
            if channel not in slate
        }
        slate.append(max(value, key=value.get))
    return slate


@pytest.mark.parametrize("penalty", [0, 0.5, 1, 100])
def test_reranking_equals_the_loop(penalty):
    slates = rerank(penalty)(SCORES, KINDS, 5, None)
    assert slates.tolist() == [greedy(scores, penalty, 5) for scores in SCORES]


def test_no_remedy_is_the_highest_and_full_penalty_brings_every_kind(notebook):
    best = [sorted(range(15), key=lambda channel: -scores[channel])[:5] for scores in SCORES]
    for choose in (notebook.highest, rerank(0)):
        assert choose(SCORES, KINDS, 5, None).tolist() == best
    explored = explore(0)(SCORES, KINDS, 5, np.random.default_rng(1))
    assert [sorted(slate) for slate in explored.tolist()] == [sorted(slate) for slate in best]
    mixed = rerank(100)(SCORES, KINDS, 5, None)
    assert all(set(KINDS[slate[:4]]) == {0, 1, 2, 3} for slate in mixed)


def test_exploration_draws_its_share_by_chance():
    scores = np.tile(np.arange(20.0), (20_000, 1))  # channels 14 to 19 are the best six
    slates = explore(0.25)(scores, np.zeros(20, int), 6, np.random.default_rng(2))
    assert all(len(set(slate)) == 6 for slate in slates[:1000].tolist())
    # Of six places 4.5 are kept on average. The 1.5 others are drawn from the channels that are
    # not kept, good ones among them.
    by_chance = np.random.default_rng(3)
    expected = np.zeros(20)
    for _ in range(20_000):
        kept = sum(by_chance.random() >= 0.25 for _ in range(6))
        expected[20 - kept :] += 1
        expected[by_chance.permutation(20 - kept)[: 6 - kept]] += 1
    difference = np.bincount(slates.ravel(), minlength=20) - expected
    assert np.abs(difference).max() < 5 * math.sqrt(20_000)


def test_popularity_is_the_click_rate(notebook):
    world = notebook.small_world(0, viewers=3, channels=4, num_kinds=2)
    seen = [(0, 2, True), (1, 2, False), (2, 0, False), (0, 2, True)]
    log = pd.DataFrame(seen, columns=["viewer", "channel", "click"])
    scores = notebook.by_popularity(world, log, None)
    assert scores.tolist() == [[1 / 5, 1 / 4, 3 / 7, 1 / 4]] * 3


def test_the_loop_shows_distinct_channels_and_clicks_as_planted(notebook):
    world, logs = notebook.small_world(4), []

    def spy(world, log, rng):
        logs.append(log)
        return notebook.by_truth(world, log, rng)

    history = notebook.closed_loop(world, spy, seed=1, rounds=4)
    assert [len(log) for log in logs] == [400 * 6 * turn for turn in (1, 2, 3)]
    assert len(history) == 4
    last = logs[-1].iloc[-400 * 6 :]
    assert all(len(set(slate)) == 6 for _, slate in last.groupby("viewer")["channel"])
    chances = world.probability[last["viewer"], last["channel"]]
    deviation = math.sqrt((chances * (1 - chances)).sum()) / len(last)
    assert abs(last["click"].mean() - chances.mean()) < 4 * deviation
    best = np.sort(world.probability, axis=1)[:, -6:].sum(1).mean()
    assert math.isclose(history["clicks"].iloc[-1], best)
    assert (history["clicks"] <= best + 1e-9).all()


def test_what_chooses_fills_every_slate_but_the_first(notebook):
    """A remedy that the loop doesn't ask would change nothing."""
    world, asked = notebook.small_world(2, viewers=30, channels=24), []

    def last_six(scores, kinds, size, rng):
        asked.append((scores, kinds, size))
        return np.tile(np.arange(18, 24), (30, 1))

    logs = []
    notebook.closed_loop(world, lambda w, log, rng: logs.append(log) or w.probability, last_six)
    assert len(asked) == 9  # of ten rounds
    assert all(np.array_equal(scores, world.probability) for scores, _, _ in asked)
    assert all(np.array_equal(kinds, world.kinds) and size == 6 for _, kinds, size in asked)
    assert set(logs[-1]["channel"].iloc[30 * 6 :]) == set(range(18, 24))
    assert len(set(logs[0]["channel"])) > 6  # the first slates are drawn by chance


@pytest.mark.parametrize("name", ["DLRM", *REMEDIES])
def test_the_benchmark_hands_each_remedy_to_the_loop(monkeypatch, name):
    handed = []

    def spy(world, score_all, choose, seed):
        handed.append(choose)
        return pd.DataFrame({"clicks": [1.0]})

    monkeypatch.setattr(closed_loop.notebook, "closed_loop", spy)
    closed_loop.ends_of(name, 0)
    assert handed == [REMEDIES.get(name, closed_loop.notebook.highest)]


def test_the_models_input_is_extremity_viewer_channel_and_kind(notebook):
    world = notebook.small_world(3, viewers=5, channels=9, num_kinds=4)
    viewers, channels = np.array([4, 0, 2]), np.array([8, 3, 6])
    batch = notebook.as_batch(world, viewers, channels, np.array([True, False, True]))
    assert np.allclose(batch.dense[:, 0], world.extremity[channels]) and batch.dense.shape == (3, 1)
    ids = [ids.tolist() for ids in batch.indices]
    assert ids == [[4, 0, 2], [8, 3, 6], [0, 3, 2]] and batch.labels.tolist() == [1, 0, 1]
    model = notebook.ByDLRM(world, 0).model
    assert [table.num_embeddings for table in model.tables] == [5, 9, 4]
    assert model.bottom[0].in_features == 1


def test_a_model_trained_anew_forgets_the_rounds_before(notebook):
    world = notebook.small_world(5, viewers=20, channels=16)
    log = pd.DataFrame({"viewer": np.arange(20), "channel": np.arange(20) % 16, "click": True})
    twice = {}
    for name in ("DLRM", "trained anew", "other weights"):
        score = closed_loop.new_scorer(name, world, 0)
        twice[name] = [score(world, log, None) for _ in range(2)]
    assert np.array_equal(*twice["trained anew"])
    assert np.array_equal(twice["DLRM"][0], twice["trained anew"][0])
    assert not np.allclose(*twice["DLRM"])
    assert not np.allclose(twice["DLRM"][0], twice["other weights"][0])


def test_the_same_seed_gives_the_same_loop(notebook):
    world = notebook.small_world(5, viewers=40, channels=24)
    one, again, other = [
        notebook.closed_loop(world, notebook.ByDLRM(world, 0), seed=seed, rounds=3)
        for seed in (0, 0, 1)
    ]
    assert one.equals(again) and not one.equals(other)


def test_dlrm_learns_who_likes_what(notebook):
    world, rng = notebook.small_world(6, viewers=60, channels=24), np.random.default_rng(0)
    viewers, channels = rng.integers(60, size=20_000), rng.integers(24, size=20_000)
    clicks = rng.random(20_000) < world.probability[viewers, channels]
    log = pd.DataFrame({"viewer": viewers, "channel": channels, "click": clicks})
    recommender = notebook.ByDLRM(world, 0)
    for _ in range(5):
        scores = recommender(world, log, None)
    truth = np.log(world.probability / (1 - world.probability))
    assert np.corrcoef(scores.ravel(), truth.ravel())[0, 1] > 0.8
    tastes = (scores - scores.mean(0)).ravel()  # without what is popular with all
    assert np.corrcoef(tastes, (truth - truth.mean(0)).ravel())[0, 1] > 0.7
