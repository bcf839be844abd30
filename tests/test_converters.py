"""Sparse indices/offsets converters, against multi-hot matrices, EmbeddingBag and naive slicing."""

import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import files
from dlrm_utils import (
    Batch,
    lengths_to_offsets,
    offsets_to_lengths,
    one_id_each,
    row_numbers,
    to_bags,
    to_offsets,
)

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


# ---- Which rows ------------------------------------------------------------------------------


@pytest.fixture
def six():
    """Six rows: row r has the number r, the bag of r ids r, and the label r % 2."""
    indices, offsets = to_offsets([[r] * r for r in range(6)])
    dense = torch.arange(6.0)[:, None]
    return Batch(dense, [indices], [offsets], torch.arange(6.0) % 2)


def rows_of(batch):
    """The rows that a part of `six` holds, read from its numbers; its bags and labels agree."""
    rows = batch.dense.flatten().long().tolist()
    assert to_bags(batch.indices[0], batch.offsets[0]) == [[r] * r for r in rows]
    assert batch.labels.tolist() == [r % 2 for r in rows]
    return rows


@given(st.data())
def test_rows_are_read_as_numpy_reads_an_index(data):
    total = data.draw(st.integers(1, 12))
    ends = st.one_of(st.none(), st.integers(-15, 15))
    step = st.one_of(st.none(), st.integers(-3, 3).filter(bool))
    index = data.draw(
        st.one_of(
            st.lists(st.integers(-total, total - 1), max_size=8),
            st.lists(st.booleans(), min_size=total, max_size=total),
            st.builds(slice, ends, ends, step),
            st.integers(-total, total - 1),
        )
    )
    numpy_index = np.array(index, dtype=int) if index == [] else index
    expected = np.atleast_1d(np.arange(total)[numpy_index]).tolist()
    forms = [index]
    if isinstance(index, list) and index:
        forms += [np.array(index), torch.tensor(index), pd.Series(index), tuple(index)]
    for form in forms:
        found = row_numbers(form, total)
        assert found.tolist() == expected and found.dtype == np.int64


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([True, False, True, False, False, True], [0, 2, 5]),
        (torch.arange(6) > 3, [4, 5]),
        (slice(0, 2), [0, 1]),
        (slice(None, None, -2), [5, 3, 1]),
        (range(4, 0, -2), [4, 2]),
        (range(0), []),
        ([], []),
        ([-1, 0, -1], [5, 0, 5]),
        (np.array([3, 3], dtype=np.uint8), [3, 3]),
        (3, [3]),
    ],
)
def test_take_of_every_form(six, rows, expected):
    assert rows_of(six.take(rows)) == expected


@pytest.mark.parametrize(
    "rows",
    [[0.9, 1.9], [0.0, 1.0], [6], [-7], range(5, 7), ["0"], [[0, 1]], [True, False], [True] * 7],
)
def test_take_refuses_fractions_rows_outside_and_masks_of_another_length(six, rows):
    with pytest.raises(ValueError if np.ndim(rows) > 1 else IndexError):
        six.take(rows)


def test_take_looks_at_the_rows_asked_for_alone(six):
    """Bags elsewhere may even be nonsense: whatever reads them all would notice."""
    broken = six._replace(offsets=[torch.tensor([0, 0, 1, 99, -5, 10])])
    assert broken.take([1]).indices[0].tolist() == [1]


# ---- Parts that do not belong together -------------------------------------------------------


def test_parts_of_a_batch_that_disagree_are_refused(six):
    dense, indices, offsets, labels = six
    with pytest.raises(ValueError, match="1 tables have ids, but 0"):
        Batch(dense, indices, [], labels)
    with pytest.raises(ValueError, match="table 0 has 5 rows, but dense has 6"):
        Batch(dense, indices, [offsets[0][:5]], labels)
    with pytest.raises(ValueError, match="labels has 2 rows, but dense has 6"):
        Batch(dense, indices, offsets, labels[:2])


def test_one_id_each_against_bags_of_one():
    batch = one_id_each([[1], [2], [3]], [[4, 5, 6], np.array([7, 8, 9])], [0, 1, 1])
    assert batch.dense.dtype == batch.labels.dtype == torch.float32
    for ids, indices, offsets in zip([[4, 5, 6], [7, 8, 9]], batch.indices, batch.offsets):
        assert to_bags(indices, offsets) == [[i] for i in ids]


@pytest.mark.parametrize("ids", [[[4, 5]], [[4, 5, 6], [4, 5, 6, 7]], [[0.5, 1.0, 2.0]]])
def test_one_id_each_refuses_missing_ids_and_fractions(ids):
    with pytest.raises(ValueError, match="table [01]"):
        one_id_each([[1], [2], [3]], ids)


# ---- Offsets and ids that PyTorch would follow into foreign memory ----------------------------


@pytest.mark.parametrize(
    "bad, words",
    [
        ([0, 2, 1], "offsets never fall"),
        ([0, -1, 2], "offsets never fall"),
        ([1, 2, 3], "start at 1"),
        ([0, 2, 6], "the end of the indices, is 5"),
        ([0.0, 1.0, 2.0], "float32"),
        ([[0, 1, 2]] * 3, "shape"),
    ],
)
@pytest.mark.parametrize("table", [0, 1])
def test_a_batch_refuses_offsets_that_cannot_be(bad, words, table):
    offsets = [torch.tensor([0, 2, 4])] * 2
    offsets[table] = torch.tensor(bad)
    with pytest.raises(ValueError, match=f"table {table}.*{words}"):
        Batch(torch.zeros(3, 1), [torch.arange(5)] * 2, offsets)


def test_what_is_no_tensor_or_beyond_int64_is_refused():
    with pytest.raises(ValueError, match="table 0: its ids are list"):
        Batch(torch.zeros(1, 1), [[0, 1]], [torch.tensor([0])])
    with pytest.raises(ValueError, match="beyond"):
        to_bags(np.array([1, 2**63 + 5], dtype=np.uint64), [0])


@pytest.mark.parametrize("ids", [[0, -3, 1], [0.0, 1.0, 2.0], [True, False, True]])
def test_a_batch_refuses_ids_that_cannot_be(ids):
    with pytest.raises(ValueError, match="table 1"):
        Batch(torch.zeros(1, 1), [torch.arange(3), torch.tensor(ids)], [torch.tensor([0])] * 2)
    with pytest.raises(ValueError, match="table 0.*start at 3"):
        Batch(torch.zeros(0, 1), [torch.arange(3)], [torch.tensor([], dtype=torch.int64)])


@pytest.mark.parametrize(
    "ids",
    [
        [-3, 1],
        np.array([2**63 + 5, 1], dtype=np.uint64),
        np.array([1, 2**64 - 1], dtype=np.uint64),
        np.array([2, -(2**31)], dtype=np.int32),
        [10**30, 1],
    ],
)
def test_one_id_each_refuses_ids_that_no_table_has(ids):
    with pytest.raises(ValueError, match="table 1"):
        one_id_each([[0.0], [1.0]], [[0, 1], ids])
    largest = one_id_each([[0.0]], [[2**63 - 1]])
    assert largest.indices[0].tolist() == [2**63 - 1]


@given(st.lists(ragged_bags.filter(len), min_size=1, max_size=3))
def test_a_batch_of_sound_bags_is_taken(tables):
    rows = min(map(len, tables))
    pairs = [to_offsets(bags[:rows]) for bags in tables]
    batch = Batch(torch.zeros(rows, 1), *zip(*pairs))
    assert [to_bags(*pair) for pair in zip(batch.indices, batch.offsets)] == [
        bags[:rows] for bags in tables
    ]


# ---- The progress bar ------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch):
    """A function that makes this process look like a notebook's, watched by a person or not."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def look(watched):
        parent = {"content": {"allow_stdin": watched}}
        shell = types.SimpleNamespace(kernel=types.SimpleNamespace(get_parent=lambda _: parent))
        module = types.SimpleNamespace(get_ipython=lambda: shell)
        monkeypatch.setitem(files.sys.modules, "IPython", module)

    monkeypatch.delitem(files.sys.modules, "IPython", raising=False)
    return look


@pytest.mark.parametrize("in_notebook", [False, True])
def test_a_bar_is_drawn_on_the_right_stream_and_takes_only_itself_away(in_notebook, kernel, capsys):
    """On stdout a notebook keeps it in its cell; in a terminal stdout may go to a file."""
    if in_notebook:
        kernel(watched=True)
    print("before")
    assert list(files.progress(range(3), delay=0, desc="counting")) == [0, 1, 2]
    out, err = capsys.readouterr()
    drawn = out.removeprefix("before\n") if in_notebook else err
    assert out.startswith("before\n") and "counting" in drawn
    assert drawn.endswith("\r") and drawn.split("\r")[-2].strip() == ""
    assert in_notebook or out == "before\n"


def test_no_bar_where_nobody_looks_where_it_is_not_wanted_or_the_work_is_short(
    kernel, capsys, monkeypatch
):
    """A notebook that a program runs would store it, however slow the machine."""
    assert list(files.progress(range(3))) == [0, 1, 2]
    with monkeypatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        assert list(files.progress(range(3), delay=0, disable=False)) == [0, 1, 2]
    kernel(watched=False)
    assert list(files.progress(range(3), delay=0)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@given(st.integers(0, 1))
@settings(max_examples=2)
def test_a_slow_machine_fails_no_random_example(number):
    """hypothesis would stop at 0.2 s an example."""
    time.sleep(0.3)
