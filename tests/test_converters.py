"""Sparse indices/offsets converters, against multi-hot matrices, EmbeddingBag and naive slicing."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlrm_utils import Batch, lengths_to_offsets, offsets_to_lengths, to_bags, to_offsets

TABLE_ROWS = 12
ragged_bags = st.lists(st.lists(st.integers(0, TABLE_ROWS - 1), max_size=6), max_size=20)


@given(ragged_bags)
def test_round_trip_keeps_order_repeats_and_empty_bags(bags):
    indices, offsets = to_offsets(bags)
    assert indices.dtype == offsets.dtype == torch.int64
    assert indices.shape == (sum(map(len, bags)),) and offsets.shape == (len(bags),)
    assert to_bags(indices, offsets) == bags


@given(ragged_bags.filter(len))
def test_embedding_bag_on_offsets_equals_multi_hot_times_matrix(bags):
    table = torch.randn(TABLE_ROWS, 3, generator=torch.Generator().manual_seed(0))
    multi_hot = torch.zeros(len(bags), TABLE_ROWS)
    for b, bag in enumerate(bags):
        for i in bag:
            multi_hot[b, i] += 1
    by_bag = torch.nn.functional.embedding_bag(
        *[to_offsets(bags)[0], table, to_offsets(bags)[1]], mode="sum"
    )
    assert torch.allclose(by_bag, multi_hot @ table, atol=1e-5)


@given(ragged_bags)
def test_lengths_and_offsets_are_inverses(bags):
    lengths = [len(bag) for bag in bags]
    offsets = lengths_to_offsets(lengths)
    assert offsets.tolist() == [sum(lengths[:b]) for b in range(len(lengths))]
    assert offsets_to_lengths(offsets, sum(lengths)).tolist() == lengths


@pytest.mark.parametrize(
    "bags",
    [
        np.array([[1, 2], [3, 4]]),
        np.array([[1, 2], [3, 4]], dtype=np.uint8),
        torch.tensor([[1, 2], [3, 4]]),
        pd.Series([[1, 2], [3, 4]]),
        pd.Series([[1, 2], [3, 4]], index=[7, 7]),
        ((1, 2), (3, 4)),
        [range(1, 3), range(3, 5)],
        [np.array([1, 2]), np.array([3, 4])],
        [[np.int32(1), 2], [3.0, 4]],
    ],
)
def test_every_form_of_bags(bags):
    indices, offsets = to_offsets(bags)
    assert indices.tolist() == [1, 2, 3, 4] and offsets.tolist() == [0, 2]


def test_no_bags_and_only_empty_bags():
    assert to_bags(*to_offsets([])) == []
    assert to_bags(*to_offsets([[], []])) == [[], []]
    assert to_offsets(np.zeros((3, 0), dtype=int))[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "bad",
    [-1, 1.5, True, np.True_, None, float("nan"), float("inf"), pd.NA, "3", 2**63, 10**30, [1]],
)
def test_a_bad_id_is_refused_by_the_name_of_its_bag(bad):
    with pytest.raises(ValueError, match="bag 1 "):
        to_offsets([[0, 1], [2, bad], [3]])


@pytest.mark.parametrize("bad", [5, None, float("nan"), "12", {1, 2}])
def test_a_bag_that_is_no_sequence_is_refused(bad):
    with pytest.raises(ValueError, match="bag 2 "):
        to_offsets([[0], [], bad])


@pytest.mark.parametrize("array", [np.array([[0, 1], [-1, 2]]), np.array([[0.5, 1], [0, 2]])])
def test_bad_arrays_are_refused(array):
    with pytest.raises(ValueError, match="bag [01] "):
        to_offsets(array)


@pytest.mark.parametrize(
    "offsets, words",
    [
        ([0, 2, 1], "offsets never fall"),
        ([1, 2], "start at 1"),
        ([0, 4], "the end of the indices, is 3"),
        ([], "start at 3"),
        ([0.0, 1.0], "integers"),
        ([[0, 1]], "one row"),
        ([False], "integers"),
        ([0, 2, 5], "the end of the indices, is 3"),
    ],
)
def test_bad_offsets_are_refused(offsets, words):
    with pytest.raises(ValueError, match=words):
        to_bags(torch.tensor([5, 6, 7]), offsets)
    with pytest.raises(ValueError, match=words):
        offsets_to_lengths(offsets, 3)


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match=r"lengths\[1\] is -2"):
        lengths_to_offsets([3, -2])


@given(ragged_bags.filter(len), st.data())
def test_take_selects_whole_bags(bags, data):
    rows = data.draw(st.lists(st.integers(0, len(bags) - 1), max_size=8))
    indices, offsets = to_offsets(bags)
    batch = Batch(
        torch.arange(len(bags) * 2.0).reshape(-1, 2),
        [indices],
        [offsets],
        torch.arange(len(bags)).float(),
    )
    taken = batch.take(rows)
    assert to_bags(taken.indices[0], taken.offsets[0]) == [bags[row] for row in rows]
    assert taken.labels.tolist() == rows and torch.equal(taken.dense, batch.dense[rows])
