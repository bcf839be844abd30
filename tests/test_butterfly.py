"""Section 15: a model split over ranks gives the unsplit one's logits, and each rank sends as many bytes as counted one by one."""
import numpy as np
import pytest
import torch

import notebook_definitions
from dlrm_utils import Batch, to_offsets

book = notebook_definitions.load()
SIZES = [5, 9, 4, 6, 3]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
def test_split_equals_unsplit_on_ragged_bags(ranks):
    rng, rows = np.random.default_rng(ranks), 11
    bags = [[rng.integers(0, size, rng.integers(0, 4)).tolist() for _ in range(rows)] for size in SIZES]
    indices, offsets = zip(*map(to_offsets, bags))
    batch = Batch(torch.rand(rows, 3), list(indices), list(offsets), None)
    torch.manual_seed(0)
    model = book.DLRM(SIZES, 4, [6], [6], num_dense=3)
    if ranks > len(SIZES):
        with pytest.raises(RuntimeError):                        # a rank without a table has nothing to send
            book.split_logits(model, batch, ranks)
        return
    logits, copies, sent = book.split_logits(model, batch, ranks)
    assert torch.allclose(logits, model(*batch[:3]), atol=1e-6) and len(copies) == ranks
    owner_of_table = [r for r, part in enumerate(np.array_split(range(len(SIZES)), ranks)) for _ in part]
    owner_of_sample = [r for r, part in enumerate(np.array_split(range(rows), ranks)) for _ in part]
    counted = [0] * ranks
    for table_owner in owner_of_table:
        for sample_owner in owner_of_sample:
            counted[table_owner] += 4 * 4 * (table_owner != sample_owner)
    assert sent == counted


def test_the_shuffle_is_its_own_inverse():
    grid = [[(r, s) for s in range(4)] for r in range(4)]
    assert book.butterfly(grid) == [[(s, r) for s in range(4)] for r in range(4)] and book.butterfly(book.butterfly(grid)) == grid


def test_seconds_a_step_by_hand():
    compute, shuffle, reduce = book.seconds_a_step(4, 16, [512, 256, 64], [512, 256])
    rows = 65_536 / 4
    assert np.isclose(compute, rows * 6 * 474_368 / 40e12)
    assert np.isclose(shuffle, 2 * rows * 0.75 * 26 * 16 * 4 / 25e9)
    assert np.isclose(reduce, 2 * 0.75 * 4 * (155_984 + 320_001) / 25e9)
