"""Vocabulary and FrameEncoder, against counting by hand."""

import collections
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlrm_utils import FrameEncoder, Vocabulary, to_bags

values_or_missing = st.lists(
    st.one_of(st.none(), st.text(max_size=3), st.integers(-5, 5)), max_size=40
)


def ids_by_hand(values, min_count, max_size):
    """The rule, slowly: count, drop the rare, sort by falling count, ties by first sight."""
    counts = collections.Counter(values)  # a dict in order of first sight
    kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: -counts[v])
    return {
        value: i + 1 for i, value in enumerate(kept[: None if max_size is None else max_size - 1])
    }


@given(
    values_or_missing, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 6)), values_or_missing
)
def test_ids_follow_the_rule(values, min_count, max_size, others):
    ids = ids_by_hand(values, min_count, max_size)
    vocabulary = Vocabulary.fit(values, min_count, max_size)
    assert len(vocabulary) == len(ids) + 1
    assert vocabulary.encode(values + others).tolist() == [ids.get(v, 0) for v in values + others]
    assert vocabulary.decode(list(range(1, len(vocabulary)))) == list(ids)


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NaT, pd.NA])
def test_every_missing_value_is_the_same_value_of_its_own(missing):
    vocabulary = Vocabulary.fit(["a", missing, missing, "b"])
    assert vocabulary.encode([None, float("nan"), "a", "b", "c"]).tolist() == [1, 1, 2, 3, 0]
    assert vocabulary.decode([1, 2, 0]) == [None, "a", Vocabulary.UNKNOWN]
    assert Vocabulary.fit(["a"]).encode([missing]).tolist() == [0]


def test_series_arrays_and_lists_agree():
    numbers = [3, 1, 3, 2]
    for values in (
        numbers,
        np.array(numbers),
        pd.Series(numbers),
        pd.Series(numbers, dtype="category"),
        tuple(numbers),
    ):
        vocabulary = Vocabulary.fit(values)
        assert vocabulary.encode(values).tolist() == [1, 2, 1, 3]
        assert (
            vocabulary.encode([3.0, 9]).tolist() == [1, 0] and vocabulary.encode([]).tolist() == []
        )
        assert vocabulary.encode(values).dtype == np.int64


def test_decode_refuses_ids_outside_the_table():
    with pytest.raises(ValueError, match="0 to 1"):
        Vocabulary.fit(["a"]).decode([2])


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "age": [20.0, 40.0, np.nan],
            "city": ["Rome", None, "Rome"],
            "tags": [["x", "y"], [], ["x"]],
            "click": [1, 0, 1],
        }
    )


@pytest.fixture
def encoder(frame):
    return FrameEncoder(dense=["age"], categorical=["city"], multi_hot=["tags"], label="click").fit(
        frame
    )


def test_frame_to_batch(encoder, frame):
    batch = encoder.transform(frame)
    assert encoder.table_sizes == [3, 3]
    assert batch.dense.dtype == torch.float32 and batch.dense.flatten().tolist() == [-1, 1, 0]
    assert batch.indices[0].tolist() == [1, 2, 1] and batch.offsets[0].tolist() == [0, 1, 2]
    assert to_bags(batch.indices[1], batch.offsets[1]) == [[1, 2], [], [1]]
    assert batch.labels.dtype == torch.float32 and batch.labels.tolist() == [1, 0, 1]
    assert encoder.transform(frame.drop(columns="click")).labels is None


def test_new_values_become_unknown_and_missing_lists_are_empty_bags(encoder):
    new = pd.DataFrame({"age": [30.0, 30.0], "city": ["Oslo", None], "tags": [["z", "x"], None]})
    batch = encoder.transform(new)
    assert batch.indices[0].tolist() == [0, 2]
    assert to_bags(batch.indices[1], batch.offsets[1]) == [[0, 1], []]
    assert len(encoder.transform(new.head(0)).dense) == 0


def test_save_and_load_give_the_same_batch(encoder, frame, tmp_path):
    encoder.save(tmp_path / "encoder.json")
    loaded = FrameEncoder.load(tmp_path / "encoder.json")
    assert loaded.table_sizes == encoder.table_sizes
    for ours, theirs in zip(encoder.transform(frame), loaded.transform(frame), strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.json"]


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(encoder, frame, tmp_path):
    path = tmp_path / "encoder.json"
    encoder.save(path)
    before = path.read_bytes()
    dates = FrameEncoder(categorical=["when"]).fit(
        pd.DataFrame({"when": [pd.Timestamp("2020-01-01")]})
    )
    with pytest.raises(ValueError, match="Timestamp"):
        dates.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "other"}', "\x00\x01"])
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="foreign.json"):
        FrameEncoder.load(path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"age": ["old"] * 3}, "'age' is not numeric"),
        ({"age": [1, math.inf, 2]}, "'age', row 1: .*infinite"),
        ({"tags": ["x|y", [], []]}, "row 0: 'x|y' is not a list"),
        ({"click": [1, 2, 0]}, "row 1: .* neither 0 nor 1"),
        ({"click": [1, None, 0]}, "row 1: .* neither 0 nor 1"),
    ],
)
def test_bad_columns_are_named(encoder, frame, change, words):
    with pytest.raises(ValueError, match=words):
        encoder.transform(frame.assign(**change))


def test_tables_without_dense_columns_and_dense_columns_without_tables(frame):
    tables = FrameEncoder(categorical=["city"]).fit(frame)
    assert tables.transform(frame).dense.shape == (3, 0) and tables.table_sizes == [3]
    numbers = FrameEncoder(dense=["age"]).fit(frame)
    assert numbers.transform(frame).indices == [] and numbers.table_sizes == []


def test_a_constant_column_and_one_without_numbers_become_zeros(frame):
    frame = frame.assign(same=5, nothing=np.nan)
    encoder = FrameEncoder(dense=["same", "nothing"]).fit(frame)
    assert not encoder.transform(frame).dense.any()


def test_an_absent_column_and_a_missing_fit_are_named(encoder, frame):
    with pytest.raises(ValueError, match="no column 'city'"):
        encoder.transform(frame.drop(columns="city"))
    with pytest.raises(ValueError, match="fit"):
        FrameEncoder(dense=["age"]).transform(frame)
    with pytest.raises(ValueError, match="fit"):
        assert FrameEncoder(categorical=["city"]).table_sizes
