"""The butterfly: a split model gives the unsplit one's logits; bytes sent as counted one by one."""

import numpy as np
import pytest
import torch

from dlrm_utils import Batch, to_offsets

SIZES = [5, 9, 4, 6, 3]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
def test_split_equals_unsplit_on_ragged_bags(notebook, ranks):
    rng, rows = np.random.default_rng(ranks), 11
    bags = [
        [rng.integers(0, size, rng.integers(0, 4)).tolist() for _ in range(rows)] for size in SIZES
    ]
    indices, offsets = zip(*map(to_offsets, bags))
    batch = Batch(torch.rand(rows, 3), list(indices), list(offsets), None)
    torch.manual_seed(0)
    model = notebook.DLRM(SIZES, 4, [6], [6], num_dense=3)
    if ranks > len(SIZES):
        with pytest.raises(RuntimeError):  # a rank without a table has nothing to send
            notebook.split_logits(model, batch, ranks)
        return
    logits, sent = notebook.split_logits(model, batch, ranks)
    assert torch.allclose(logits, model(*batch[:3]), atol=1e-6)
    owner_of_table = [
        r for r, part in enumerate(np.array_split(range(len(SIZES)), ranks)) for _ in part
    ]
    owner_of_sample = [r for r, part in enumerate(np.array_split(range(rows), ranks)) for _ in part]
    counted = [0] * ranks
    for table_owner in owner_of_table:
        for sample_owner in owner_of_sample:
            counted[table_owner] += 4 * 4 * (table_owner != sample_owner)
    assert sent == counted


def test_the_shuffle_is_its_own_inverse(notebook):
    grid = [[(r, s) for s in range(4)] for r in range(4)]
    assert notebook.butterfly(grid) == [[(s, r) for s in range(4)] for r in range(4)]
    assert notebook.butterfly(notebook.butterfly(grid)) == grid
