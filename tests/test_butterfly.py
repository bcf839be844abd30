"""The butterfly: a split model gives the unsplit one's logits; bytes sent as counted one by one."""

import itertools

import numpy as np
import pytest
import torch

from dlrm_utils import Batch, to_offsets

SIZES, ROWS = [5, 9, 4, 6, 3], 11


@pytest.fixture(scope="module")
def batch():
    """Ragged bags of every table, none of them all empty."""
    rng = np.random.default_rng(0)
    bags = [
        [rng.integers(0, size, rng.integers(0, 4)).tolist() for _ in range(ROWS)] for size in SIZES
    ]
    indices, offsets = zip(*map(to_offsets, bags))
    return Batch(torch.randn(ROWS, 3), list(indices), list(offsets), None)


@pytest.fixture(scope="module")
def model(notebook):
    """A model whose every table moves every logit, as a trained one's do."""
    torch.manual_seed(0)
    model = notebook.DLRM(SIZES, 4, [6], [6], num_dense=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_split_equals_unsplit_on_ragged_bags(notebook, model, batch, ranks):
    logits, sent = notebook.split_logits(model, batch, ranks)
    assert torch.allclose(logits, model(*batch[:3]), atol=1e-5)
    owner_of_table = [
        r for r, part in enumerate(np.array_split(range(len(SIZES)), ranks)) for _ in part
    ]
    owner_of_sample = [r for r, part in enumerate(np.array_split(range(ROWS), ranks)) for _ in part]
    counted = [0] * ranks
    for table_owner in owner_of_table:
        for sample_owner in owner_of_sample:
            counted[table_owner] += 4 * 4 * (table_owner != sample_owner)
    assert sent == counted


def test_a_rank_without_a_table_has_nothing_to_send(notebook, model, batch):
    with pytest.raises(RuntimeError):
        notebook.split_logits(model, batch, 7)


def differs(notebook, model, batch, ranks=2):
    logits, _ = notebook.split_logits(model, batch, ranks)
    return (logits - model(*batch[:3])).abs().max() > 0.1


@pytest.mark.parametrize("table", range(5))
def test_lookups_of_zero_are_noticed(notebook, model, batch, monkeypatch, table):
    """Each table counts: with its lookups zero in the split model alone, logits differ."""
    assert not differs(notebook, model, batch)
    expected = model(*batch[:3])
    with monkeypatch.context() as patch:
        patch.setattr(model.tables[table], "forward", lambda *_: torch.zeros(ROWS, 4))
        logits, _ = notebook.split_logits(model, batch, 2)
    assert (logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_shuffle_that_sends_the_wrong_examples_is_noticed(notebook, model, batch, ranks):
    """Blocks of equal size that go to another rank, or to nobody but their own."""
    rows = ranks * (ROWS // ranks)
    even = batch.take(range(rows))

    def turned(grid):
        right = notebook.butterfly(grid)
        return right[1:] + right[:1]

    def kept(grid):
        return [[row[0] for row in grid] for _ in grid]

    for wrong in (turned, kept):
        names = notebook.split_logits.__globals__
        right = names["butterfly"]
        names["butterfly"] = wrong
        try:
            assert differs(notebook, model, even, ranks)
        finally:
            names["butterfly"] = right
    assert not differs(notebook, model, even, ranks)


def test_the_shuffle_is_its_own_inverse(notebook):
    grid = [[(r, s) for s in range(4)] for r in range(4)]
    assert notebook.butterfly(grid) == [[(s, r) for s in range(4)] for r in range(4)]
    assert notebook.butterfly(notebook.butterfly(grid)) == grid
    flat = itertools.chain.from_iterable(notebook.butterfly(grid))
    assert sorted(flat) == sorted(itertools.chain.from_iterable(grid))
