"""Toy clicks: a file in Criteo's raw format, whose true click probabilities are known.

    python -m data.toy_clicks data/toy.txt --rows 200000

How the truth is planted. logit = bias + dense weights · z + sum of category effects
+ sum over pairs (j, k) of interacting fields of sign[j, k] · <vector_j, vector_k>,
where z is log(1 + max(x, 0)) of each integer, standardised; a missing one counts as 0, as it does
for the model. Field 0 of the interacting ones is the dense part, the others are five categorical
columns. A category is known by its rank, 0 the most frequent of its column; effects and vectors
shrink with 1 / (1 + rank / 10), so that hardly anything hangs on names too rare to be learned.
"""

import argparse
import os
import sys
import time

import numpy as np
import polars as pl

from data.criteo import CATEGORIES, CRITEO_KAGGLE_TABLE_SIZES, INTEGERS, NUM_DENSE, NUM_TABLES
from data.files import MISSING, in_order, progress, replacing

BASE_RATE = 0.256  # of clicks, as in Criteo's file
EFFECTS = 1024  # the effects and vectors of a column; ranks share them, modulo this
CHUNK = 20_000  # rows drawn together: another number would give other rows
FOUR_HEX_DIGITS = pl.Series([f"{number:04x}" for number in range(1 << 16)])


class ToyTruth:
    """What the data would tell a perfect reader; `signal=False` leaves only the base rate.

    Means and bias are rounded: the last bits of sums differ between machines, the file must not.
    """

    def __init__(self, seed=0, signal=True):
        rng = np.random.default_rng([seed, 0])
        self.signal = signal
        self._draw_columns(rng)
        self._draw_effects(rng)
        dense, ranks = self.draw(np.random.default_rng([seed, 1]), 100_000)
        logs = logarithms(dense)
        self.mean, self.std = logs.mean(0).round(6), logs.std(0).round(6)
        self.bias = 0.0
        self.bias = round(_bias_for(self.logit(dense, ranks)), 6)

    def _draw_columns(self, rng):
        """How large the integers are, and how often a value is missing."""
        self.log_mean = rng.uniform(0.5, 3.0, NUM_DENSE)
        self.log_std = rng.uniform(0.8, 1.6, NUM_DENSE)
        shares = [0, 0, 0.01, 0.04, 0.04, 0.05, 0.2, 0.2, 0.22, 0.22, 0.45, 0.45, 0.75]
        self.dense_missing = rng.permutation(shares)
        shares = [0] * 15 + [0.03] * 5 + [0.12, 0.35, 0.44, 0.44, 0.5, 0.76]
        self.sparse_missing = rng.permutation(shares)

    def _draw_effects(self, rng):
        """What each column does alone, which five interact, and the sign of each pair."""
        self.dense_weights = rng.normal(0, 0.25, NUM_DENSE)
        self.dense_projection = rng.normal(0, NUM_DENSE**-0.5, (NUM_DENSE, 2))
        self.effects = rng.normal(0, 0.35, (NUM_TABLES, EFFECTS))
        self.vectors = rng.normal(0, 0.8, (NUM_TABLES, EFFECTS, 2))
        sizes = np.array(CRITEO_KAGGLE_TABLE_SIZES)
        middling = np.flatnonzero((sizes >= 10) & (sizes <= 6000) & (self.sparse_missing < 0.2))
        self.fields = np.sort(rng.permutation(middling)[:5])
        signs = np.triu(rng.choice([-1.0, 1.0], (6, 6)), 1)
        self.signs = signs + signs.T  # (6, 6), zero diagonal

    def draw(self, rng, rows):
        """Integers (rows, 13) int32 and category ranks (rows, 26) int64, -1 missing."""
        counts = np.expm1(rng.normal(self.log_mean, self.log_std, (rows, NUM_DENSE)))
        dense = np.clip(counts, -1, 2**31 - 1).astype(np.int32)
        dense[:, 1] -= 2  # Criteo's I2 goes below zero, too
        dense[rng.random(dense.shape) < self.dense_missing] = MISSING
        ranks = np.stack([_long_tail(rng, n, rows) for n in CRITEO_KAGGLE_TABLE_SIZES], axis=1)
        ranks[rng.random(ranks.shape) < self.sparse_missing] = -1
        return dense, ranks

    def logit(self, dense, ranks):
        """True log-odds of a click, (rows,)."""
        z = np.clip((logarithms(dense) - self.mean) / self.std, -3, 3)
        places = ranks % EFFECTS
        loudness = 1 / (1 + np.maximum(ranks, 0) / 10)
        effects = self.effects[np.arange(NUM_TABLES), places] * loudness  # (rows, 26)
        names = self.vectors[self.fields, places[:, self.fields]] * loudness[:, self.fields, None]
        vectors = np.concatenate([(z @ self.dense_projection)[:, None], names], axis=1)
        pairs = np.einsum("bjd,jk,bkd->b", vectors, self.signs, vectors, optimize=True) / 2
        return self.bias + self.signal * (z @ self.dense_weights + effects.sum(1) + pairs)


def logarithms(dense):
    """log(1 + x), and 0 for what is missing or negative: what a model is given, in 64 bits."""
    return np.log1p(np.maximum(dense, 0).astype(float))


def _bias_for(logits):
    """What has to be added to the logits so that the mean probability is the base rate."""
    from scipy.optimize import brentq  # here, as its import takes most of a second

    return brentq(lambda bias: _sigmoid(logits + bias).mean() - BASE_RATE, -20, 20)


def _long_tail(rng, size, rows):
    """Ranks 0 to size - 1 with probability falling as (rank + 1) ** -1.2, (rows,) int64."""
    tail = (((size + 1) ** (1 - 1.2) - 1) * rng.random(rows) + 1) ** (1 / (1 - 1.2))
    return tail.astype(np.int64) - 1


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def toy_codes(ranks):
    """The 32-bit numbers (rows, 26) of categories in the file, no two of a column the same."""
    return ((ranks + 1) * 2654435761 + np.arange(NUM_TABLES) * 2246822507) & 0xFFFFFFFF


def write_toy_criteo(path, rows, seed=0, signal=True):
    """Write toy clicks in Criteo's raw format; the true click probabilities, (rows,) float64.

    The same seed writes the same rows, and a longer file starts with the shorter one. The file gets
    its name when it is whole.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a file has at least one row")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        return _write_lines(file, rows, ToyTruth(seed, signal), seed)


def _write_lines(file, rows, truth, seed):
    starts = range(0, rows, CHUNK)
    chunks = in_order(lambda start: _lines(truth, seed, start, rows), starts, os.cpu_count())
    bar = {"desc": "writing toy clicks", "total": len(starts), "unit_scale": CHUNK}
    probabilities = []
    for text, probability in progress(chunks, unit=" rows", **bar):
        file.write(text)
        probabilities.append(probability)
    return np.concatenate(probabilities)


def _lines(truth, seed, start, rows):
    """The text of at most CHUNK rows from start on, as bytes, and their click probabilities."""
    rng = np.random.default_rng([seed, 2, start // CHUNK])
    kept = min(CHUNK, rows - start)
    dense, ranks = truth.draw(rng, CHUNK)  # whole chunks, so that a shorter file is the start
    probability = _sigmoid(truth.logit(dense, ranks))
    columns = {"label": (rng.random(CHUNK) < probability).astype(np.uint8)}
    columns |= zip(INTEGERS, dense.T)
    for name, rank, code in zip(CATEGORIES, ranks.T, toy_codes(ranks).T, strict=True):
        columns[name] = _hex_digits(code).set(pl.Series(rank < 0), None)
    frame = pl.DataFrame(columns)[:kept].with_columns(pl.col(INTEGERS).replace(MISSING, None))
    return frame.write_csv(include_header=False, separator="\t").encode(), probability[:kept]


def _hex_digits(codes):
    """Eight digits each, as two looked-up halves: many times faster than formatting one by one."""
    high, low = divmod(codes, 1 << 16)
    return FOUR_HEX_DIGITS.gather(high) + FOUR_HEX_DIGITS.gather(low)


def main(arguments=None):
    """The command: write a file, and say how long it took."""
    parser = argparse.ArgumentParser("data.toy_clicks", description="Toy clicks as Criteo has them")
    parser.add_argument("out", metavar="OUT", help="the file to write; an old one is replaced")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-signal", action="store_true", help="labels are coin flips")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        write_toy_criteo(options.out, options.rows, options.seed, signal=not options.no_signal)
    except (OSError, ValueError) as error:
        sys.exit(f"data.toy_clicks: {error}")
    seconds = time.perf_counter() - start
    print(f"{options.rows:,} rows in {seconds:.1f} s, {options.rows / seconds:,.0f} rows/s")


if __name__ == "__main__":
    main()
