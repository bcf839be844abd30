"""Section 16 in ten worlds: the closed loop under every recommender and remedy, means of the last three rounds.

Writes figures/measured/closed_loop.csv; the notebook counts in how many worlds its conclusions hold.
"""
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions
from learning_rates import MEASURED, in_parallel

book = notebook_definitions.load()
WORLDS = range(10)
REMEDIES = {f"explore {share}": book.explore(share) for share in (0.1, 0.2, 0.4)} | {
    f"re-rank {penalty}": book.rerank(penalty) for penalty in (0.5, 1, 2)}
WITHOUT_MODEL = {"chance": book.by_chance, "popularity": book.by_popularity, "truth": book.by_truth}
PULLS = {"no pull": 0.0, "double pull": 3.0}


def ends_of(name, seed):
    """The measures of one way of recommending in one world."""
    world = book.small_world(seed, PULLS.get(name, 1.5))
    score = WITHOUT_MODEL.get(name) or book.ByDLRM(world, seed)
    history = book.closed_loop(world, score, REMEDIES.get(name, book.highest), seed)
    return dict(data="small world", world=seed, way=name, catalogue=world.extremity.mean(), **history.tail(3).mean())


def main():
    ways = [*WITHOUT_MODEL, "DLRM", *PULLS, *REMEDIES]
    rows = in_parallel(ends_of, [(name, seed) for seed in WORLDS for name in ways])
    table = pd.DataFrame(rows).round(4)
    table.to_csv(MEASURED / "closed_loop.csv", index=False)
    print(table.drop(columns=["data", "world"]).groupby("way", sort=False).agg(["mean", "std"]).round(2).to_string())


if __name__ == "__main__":
    main()
