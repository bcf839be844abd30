"""The closed loop in ten worlds, under every recommender and remedy: means of the last rounds.

Two ways ask what hangs on the model itself: it is trained anew in each round, or starts from other
random weights. Writes figures/measured/closed_loop.csv; a test counts in how many worlds the
conclusions hold. A number as argument gives another count of worlds. Some 8 minutes.
"""

import sys

import numpy as np
import pandas as pd

from shared import in_parallel, notebook, save


def explore(share):
    """Each place of a slate goes, with probability `share`, to a channel drawn by chance."""

    def choose(scores, kinds, size, rng):
        order = np.argsort(-scores, axis=1, kind="stable")
        rank = np.argsort(order, axis=1)  # (V, C), 0 is the best
        kept = rng.binomial(size, 1 - share, (len(scores), 1))
        return np.argsort(np.where(rank < kept, -1, rng.random(scores.shape)), axis=1)[:, :size]

    return choose


def rerank(penalty):
    """A channel loses `penalty` for each channel of its kind that is in the slate already."""

    def choose(scores, kinds, size, rng):
        scores = scores.copy()
        slate = []
        for _ in range(size):
            slate.append(scores.argmax(1))
            scores -= penalty * (kinds == kinds[slate[-1]][:, None])
            np.put_along_axis(scores, slate[-1][:, None], -np.inf, axis=1)
        return np.stack(slate, axis=1)  # (V, size)

    return choose


EXPLORED = {f"explore {share}": explore(share) for share in (0.1, 0.2, 0.4)}
RERANKED = {f"re-rank {penalty}": rerank(penalty) for penalty in (0.5, 1, 2)}
REMEDIES = EXPLORED | RERANKED
WITHOUT_MODEL = {
    "chance": notebook.by_chance,
    "popularity": notebook.by_popularity,
    "truth": notebook.by_truth,
}
PULLS = {"no pull": 0.0, "double pull": 3.0}
OTHER_SEED = 100  # added to the seed of DLRM's own random weights


def new_scorer(name, world, seed):
    """What scores all channels for every viewer under this name, for one run of the loop."""
    if name in WITHOUT_MODEL:
        return WITHOUT_MODEL[name]
    if name == "trained anew":  # a new model each round, which sees all clicks so far once
        return lambda *seen: notebook.ByDLRM(world, seed)(*seen)
    return notebook.ByDLRM(world, seed + OTHER_SEED * (name == "other weights"))


def ends_of(name, seed):
    """The measures of one way of recommending in one world."""
    world = notebook.small_world(seed, PULLS.get(name, 1.5))
    score = new_scorer(name, world, seed)
    choose = REMEDIES.get(name, notebook.highest)
    history = notebook.closed_loop(world, score, choose, seed)
    about = {"data": "small world", "world": seed, "way": name}
    return about | {"catalogue": world.extremity.mean()} | dict(history.tail(3).mean())


def main(worlds=10):
    ways = [*WITHOUT_MODEL, "DLRM", "trained anew", "other weights", *PULLS, *REMEDIES]
    jobs = [(name, seed) for seed in range(worlds) for name in ways]
    table = pd.DataFrame(in_parallel(ends_of, jobs)).round(4)
    save(table, "closed_loop", worlds == 10)
    measures = table.drop(columns=["data", "world"]).groupby("way", sort=False)
    print(measures.agg(["mean", "std"]).round(2).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
