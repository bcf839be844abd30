"""Vocabulary and FrameEncoder, against counting by hand."""

import collections
import datetime
import json
import math
import os

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

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


@pytest.mark.parametrize("options", [{"min_count": 0}, {"max_size": 0}])
def test_a_vocabulary_of_no_size_is_refused(options):
    with pytest.raises(ValueError, match="1 or more"):
        Vocabulary.fit(["a"], **options)


def test_decode_refuses_fractions():
    with pytest.raises(ValueError, match="integers"):
        Vocabulary.fit(["a"]).decode([0.9])


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


def equal(one, other):
    """Are two batches of the same numbers, ids, bags and labels?"""
    return all(all(map(torch.equal, ours, theirs)) for ours, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["encoder", "run[1]", "a*b", "x?", "{p}"])
def test_save_and_load_give_the_same_batch_and_no_path_is_a_pattern(encoder, frame, tmp_path, name):
    for sibling in ("encoder2", "run1", "ab", "xy", "p"):
        FrameEncoder(["age"], ["city"], ["tags"]).fit(frame.iloc[::2]).save(tmp_path / sibling)
    encoder.save(tmp_path / name)
    encoder.save(tmp_path / name)  # over an older one
    loaded = FrameEncoder.load(tmp_path / name)
    assert loaded.table_sizes == encoder.table_sizes
    assert loaded.fingerprint() == encoder.fingerprint()
    assert equal(loaded.transform(frame), encoder.transform(frame))
    assert len(list(tmp_path.iterdir())) == 6


def test_the_vocabulary_files_are_read_without_this_module(tmp_path):
    """By pandas and by polars alone; named after a column's place and what is plain of its name."""
    names = ["7", None, 'a, "b"', "line\nbreak", "a\rb", "007", "ü", " x "]
    frame = pd.DataFrame({"label": [0] * 8, "C1": names, "../é?*": [[k] for k in range(8)]})
    encoder = FrameEncoder(categorical=["C1"], multi_hot=["../é?*"], label="label").fit(frame)
    encoder.save(tmp_path / "e")
    files = {path.name for path in (tmp_path / "e").iterdir()}
    assert files == {"settings.json", "1-C1.csv", "2-é.csv"}
    table = pd.read_csv(tmp_path / "e/1-C1.csv", dtype=str, lineterminator="\n")
    assert table["id"].tolist() == [str(k + 1) for k in range(8)]
    assert [None if pd.isna(name) else name for name in table["name"]] == names
    table = pl.read_csv(tmp_path / "e/1-C1.csv", schema={"id": pl.Int64, "name": pl.String})
    assert table["name"].to_list() == names
    loaded = FrameEncoder.load(tmp_path / "e")
    assert equal(loaded.transform(frame), encoder.transform(frame))


def test_a_disk_that_fails_at_the_end_leaves_the_old_folder_and_no_other(
    encoder, tmp_path, monkeypatch
):
    path = tmp_path / "encoder"
    encoder.save(path)
    before = {file: file.read_bytes() for file in path.iterdir()}

    def broken(descriptor):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        encoder.save(path)
    assert before == {file: file.read_bytes() for file in path.iterdir()}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "other"}', "\x00\x01"])
def test_foreign_folders_are_refused(encoder, content, tmp_path):
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign is not a whole folder"):
        FrameEncoder.load(tmp_path / "foreign")
    (tmp_path / "foreign/settings.json").write_text(content)
    with pytest.raises(ValueError, match="foreign"):
        FrameEncoder.load(tmp_path / "foreign")
    (tmp_path / "foreign/settings.json").rename(tmp_path / "foreign/thesis.txt")
    with pytest.raises(ValueError, match="foreign holds what save did not write"):
        encoder.save(tmp_path / "foreign")


@pytest.mark.parametrize("damage", ["absent", "cut", "other"])
def test_a_damaged_vocabulary_is_refused(encoder, frame, tmp_path, damage):
    encoder.save(tmp_path / "e")
    path = tmp_path / "e/2-city.csv"
    content = path.read_bytes()
    assert b"Rome" in content
    path.unlink()
    if damage == "absent":
        with pytest.raises(ValueError, match="2-city.csv"):
            FrameEncoder.load(tmp_path / "e")
    elif damage == "cut":
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match="2-city.csv is cut"):
            FrameEncoder.load(tmp_path / "e")
    else:
        path.write_bytes(content.replace(b"Rome", b"Oslo"))
        with pytest.raises(ValueError, match="2-city.csv was changed"):
            FrameEncoder.load(tmp_path / "e").transform(frame)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"age": ["old"] * 3}, "row 0, column 'age': 'old' is not a number"),
        ({"age": [1, math.inf, 2]}, "row 1, column 'age': inf is infinite"),
        ({"tags": ["x|y", [], []]}, r"row 0, column 'tags': 'x\|y' is not a list"),
        ({"click": [1, 2, 0]}, "row 1, .* neither 0 nor 1"),
        ({"click": [1, None, 0]}, "row 1, .* neither 0 nor 1"),
        ({"age": [[1], 2, 3]}, r"row 0, column 'age': \[1\] is not a number"),
        ({"age": pd.to_datetime(["2020-01-01"] * 3)}, "row 0, column 'age': .* is not a number"),
        ({"age": [1, 1e300, 2]}, "row 1, column 'age': 1e.300 is too large"),
        ({"city": ["Rome", "Rome", ["Oslo"]]}, r"row 2, column 'city': \['Oslo'\] is not a text"),
        ({"tags": [["x"], ["y", ["x"]], []]}, r"row 1, column 'tags': \['x'\] is not a text"),
        ({"tags": [["x"], {"x": 1}, []]}, "row 1, column 'tags': {'x': 1} is not a list"),
        ({"tags": [["x"], {"x"}, []]}, "row 1, column 'tags': {'x'} is not a list"),
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


# ---- Scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [0.1, 1e-9, -3.3, 1e10, 0.0, 7])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_constant_column_is_only_moved(same, rows):
    encoder = FrameEncoder(dense=["age"]).fit(pd.DataFrame({"age": [same] * rows}))
    moved = encoder.transform(pd.DataFrame({"age": [same, same + 0.5]})).dense.flatten()
    assert moved.tolist() == pytest.approx([0, 0.5], abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_scaling_is_that_of_scikit_learn(numbers):
    frame = pd.DataFrame({"x": numbers})
    expected = StandardScaler().fit_transform(frame.to_numpy())
    ours = FrameEncoder(dense=["x"]).fit(frame).transform(frame).dense.numpy()
    assert np.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_counts_are_put_through_a_logarithm_and_come_after_dense():
    frame = pd.DataFrame({"clicks": [0, 999.0, np.nan, -5], "age": [1, 2, 3, np.nan]})
    encoder = FrameEncoder(counts=["clicks"], dense=["age"]).fit(frame)
    dense = encoder.transform(frame).dense
    assert dense[:, 1].tolist() == pytest.approx([0, math.log(1000), 0, 0])
    assert dense[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5, 0])


# ---- Kinds of values -------------------------------------------------------------------------

EVERY_KIND = {
    "object": pd.Series(["a", None, "b", "a"], dtype=object),
    "str": pd.Series(["a", None, "b", "a"]),
    "string": pd.Series(["a", None, "b", "a"], dtype="string"),
    "category": pd.Series(["a", None, "b", "a"], dtype="category"),
    "int": pd.Series([3, 1, 3, 2]),
    "uint8": pd.Series([3, 1, 3, 2], dtype="uint8"),
    "Int64": pd.Series([3, None, 3, 2], dtype="Int64"),
    "float": pd.Series([3, np.nan, 3, 0.5]),
    "bool": pd.Series([True, False, True, True]),
    "boolean": pd.Series([True, None, False, True], dtype="boolean"),
    "bool objects": pd.Series([True, None, False, True], dtype=object),
    "datetime": pd.to_datetime(pd.Series(["2020-01-01", None, "2021-01-01", "2020-01-01"])),
    "timezone": pd.Series(pd.to_datetime(["2020-01-01 12:00"] * 4, utc=True)),
    "dates": pd.Series([datetime.date(2020, 1, 1), None] * 2, dtype=object),
    "categories of times": pd.Series(pd.to_datetime(["2020-01-01", None] * 2)).astype("category"),
    "only missing": pd.Series([None] * 4, dtype=object),
}


def by_hand(values):
    """Ids of a column, where every value stands for itself and a missing one for None."""
    values = [None if pd.isna(value) else value for value in values.astype(object)]
    ids = ids_by_hand(values, 1, None)
    return [ids[value] for value in values]


def check_kind(column, tmp_path):
    """Ids as by hand, in a column and in bags, and after save and load; others are refused."""
    frame = pd.DataFrame({"one": column, "bags": [[value] for value in column]})
    encoder = FrameEncoder(categorical=["one"], multi_hot=["bags"]).fit(frame)
    encoder.save(tmp_path / "encoder")
    for ours in (encoder, FrameEncoder.load(tmp_path / "encoder")):
        batch = ours.transform(frame)
        assert batch.indices[0].tolist() == batch.indices[1].tolist() == by_hand(column)
        single = ours.transform(dict(frame.iloc[2]))
        assert single.indices[0].tolist() == by_hand(column)[2:3]
        assert ours.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_kind_of_column(name, tmp_path):
    check_kind(EVERY_KIND[name], tmp_path)


def test_arrow_columns(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    kinds = {
        "text": (arrow.string(), ["a", None, "b", "a"]),
        "dictionary": (arrow.dictionary(arrow.int32(), arrow.string()), ["a", None, "b", "a"]),
        "number": (arrow.int64(), [3, None, 3, 2]),
        "boolean": (arrow.bool_(), [True, None, False, True]),
        "day": (arrow.date32(), [datetime.date(2020, 1, 1), None] * 2),
        "time": (arrow.timestamp("us"), [datetime.datetime(2020, 1, 1), None] * 2),
    }
    for kind, values in kinds.values():
        check_kind(pd.Series(values, dtype=pd.ArrowDtype(kind)), tmp_path)


@pytest.mark.parametrize(
    "fitted, given, words",
    [
        ([1, 2], ["1", "2"], "row 0, column 'id': '1' is not a number"),
        ([1, 2], [1, "2"], "row 1, column 'id': '2' is not a number"),
        (["01234567", "1e5"], [1234567, 1e5], "row 0, column 'id': 1234567.0 is not a text"),
        ([1, 2], [True, False], "row 0, column 'id': True is not a number"),
        ([True, False], [1, 0], "row 0, column 'id': 1 is not a boolean"),
        ([1, None], [None, True], "row 1, column 'id': True is not a number"),
        (
            pd.to_datetime(["2020-01-01"] * 2),
            ["2020-01-01"] * 2,
            "row 0, column 'id': '2020-01-01' is not a time",
        ),
        ([1, 2], [1, math.inf], "row 1, column 'id': inf is infinite"),
    ],
)
def test_values_of_another_kind_than_fitted_are_refused(fitted, given, words):
    encoder = FrameEncoder(categorical=["id"]).fit(pd.DataFrame({"id": fitted}))
    with pytest.raises(ValueError, match=words):
        encoder.transform(pd.DataFrame({"id": given}))
    if len({*map(type, given)}) == 1:
        with pytest.raises(ValueError, match=words.replace("Timestamp", "datetime")):
            encoder.transform(pl.DataFrame({"id": given}).lazy())


@pytest.mark.parametrize(
    "values, words",
    [
        ([1, "a"], "1, column 'id': 'a' is not a number"),
        (["a", True], "1, column 'id': True is not a text"),
        ([1, True], "1, column 'id': True is not a number"),
        ([(1, 2), (3, 4)], r"0, column 'id': \(1, 2\) is not a text, number"),
        ([b"a", b"b"], "0, column 'id': b'a' is not a text, number"),
        ([[1], [2]], r"0, column 'id': \[1\] is not a text, number"),
        ([1.5, -math.inf], "1, column 'id': -inf is infinite"),
    ],
)
def test_a_column_that_cannot_be_a_table_is_refused_by_fit(values, words):
    with pytest.raises(ValueError, match="row " + words):
        FrameEncoder(categorical=["id"]).fit(pd.DataFrame({"id": pd.Series(values, dtype=object)}))


def test_numbers_are_equal_whatever_their_type():
    encoder = FrameEncoder(categorical=["id"]).fit(pd.DataFrame({"id": [7, 7, 2**53 + 1]}))
    for ids in ([7.0, np.nan], pd.array([7, None], dtype="Int8"), pl.Series([7, None]).to_list()):
        assert encoder.transform(pd.DataFrame({"id": ids})).indices[0].tolist() == [1, 0]
    large = pd.DataFrame({"id": [2**53, 2**53 + 1]})
    assert encoder.transform(large).indices[0].tolist() == [0, 2]


def test_min_count_leaves_rare_values_to_the_unknown_one():
    frame = pd.DataFrame({"id": list("aab"), "tags": [["x"], ["x", "y"], None]})
    encoder = FrameEncoder(categorical=["id"], multi_hot=["tags"], min_count=np.int64(2)).fit(frame)
    batch = encoder.transform(frame)
    assert batch.indices[0].tolist() == [1, 1, 0] and batch.indices[1].tolist() == [1, 1, 0]
    assert encoder.table_sizes == [2, 2]


# ---- Forms of frames -------------------------------------------------------------------------


def test_polars_dicts_and_series_give_the_same_batch(encoder, frame):
    expected = encoder.transform(frame)
    # pandas' text has NaN for a missing value, of which polars would make a text.
    table = pl.DataFrame(frame.to_dict("list") | {"city": ["Rome", None, "Rome"]}, strict=False)
    columns = encoder.transform(frame.to_dict("list"))
    again = FrameEncoder(["age"], ["city"], ["tags"], "click").fit(table)
    for batch in (encoder.transform(table), columns, again.transform(table)):
        for ours, theirs in zip(batch, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
    for k in range(len(frame)):
        for row in (frame.iloc[k], frame.iloc[k].to_dict(), table.to_dicts()[k]):
            for ours, theirs in zip(encoder.transform(row), expected.take([k]), strict=True):
                assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("rows", [[1, 2], 5, np.zeros((2, 2)), b"a", None, [b"a"], {1: 2}.items()])
def test_what_is_no_frame_is_refused(encoder, rows):
    with pytest.raises(ValueError, match="rows are a DataFrame|raw lines"):
        encoder.transform(rows)


def test_columns_of_polars_types():
    table = pl.DataFrame(
        {
            "day": [datetime.date(2020, 1, 1), None],
            "name": pl.Series(["a", "b"], dtype=pl.Categorical),
            "large": pl.Series([2**60 + 1, None], dtype=pl.Int64),
            "tags": [["x"], None],
        }
    )
    encoder = FrameEncoder(categorical=["day", "name", "large"], multi_hot=["tags"]).fit(table)
    assert [ids.tolist() for ids in encoder.transform(table).indices] == [
        [1, 2],
        [1, 2],
        [1, 2],
        [1],
    ]
    assert encoder.vocabulary("large").values == [2**60 + 1, None]


# ---- Columns ---------------------------------------------------------------------------------


def test_a_missing_column_has_one_true_message(frame):
    for kind in ("dense", "counts", "categorical", "multi_hot"):
        with pytest.raises(ValueError, match="^the frame has no column 'height'; it has "):
            FrameEncoder(**{kind: ["height"]}).fit(frame)
    with pytest.raises(ValueError, match="^the frame has no column 'clicked'"):
        FrameEncoder(dense=["age"], label="clicked").fit(frame)


def test_a_column_twice_is_refused(frame):
    twice = pd.concat([frame, frame[["city"]]], axis=1)
    with pytest.raises(ValueError, match="several columns 'city'"):
        FrameEncoder(categorical=["city"]).fit(twice)
    for names in (
        {"categorical": ["city"], "multi_hot": ["city"]},
        {"dense": ["age", "age"]},
        {"dense": ["age"], "counts": ["age"]},
        {"dense": ["click"], "label": "click"},
    ):
        with pytest.raises(ValueError, match="named twice"):
            FrameEncoder(**names)
    both = FrameEncoder(dense=["age"], categorical=["age"]).fit(frame)
    assert both.transform(frame).dense.shape == (3, 1) and both.table_sizes == [4]


@pytest.mark.parametrize("wrong", [{"dense": "age"}, {"categorical": [("a", "b")]}, {"label": 1.5}])
def test_names_are_texts_or_whole_numbers_in_a_list(wrong):
    with pytest.raises((ValueError, TypeError)):
        FrameEncoder(**wrong)


@pytest.mark.parametrize("min_count", [0, -1, 1.5])
def test_a_min_count_that_is_none_is_refused(min_count):
    with pytest.raises((ValueError, TypeError)):
        FrameEncoder(categorical=["a"], min_count=min_count).fit(pd.DataFrame({"a": [1]}))


def test_fit_on_no_rows_is_refused(frame):
    with pytest.raises(ValueError, match="no rows"):
        FrameEncoder(dense=["age"]).fit(frame.head(0))


def test_a_fit_that_fails_changes_nothing(encoder, frame):
    new = FrameEncoder(dense=["age"], categorical=["city", "click"])
    with pytest.raises(ValueError):
        new.fit(frame.assign(click=[[1], [2], [3]]))
    with pytest.raises(ValueError, match="has seen no rows"):
        new.transform(frame)
    before = encoder.fingerprint()
    with pytest.raises(ValueError):
        encoder.fit(frame.assign(age=5, tags=7))
    assert encoder.fingerprint() == before


# ---- The file --------------------------------------------------------------------------------


def test_whole_numbers_as_column_names_survive_the_file(tmp_path):
    frame = pd.DataFrame({0: [1.0, 3.0], 1: ["a", "b"], 2: [["x"], []], 3: [0, 1]})
    names = np.arange(4)
    encoder = FrameEncoder(names[:1], names[1:2], names[2:3], label=names[3]).fit(frame)
    encoder.save(tmp_path / "encoder")
    loaded = FrameEncoder.load(tmp_path / "encoder")
    for ours, theirs in zip(encoder.transform(frame), loaded.transform(frame), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_numpy_numbers_among_objects_are_saved(tmp_path):
    frame = pd.DataFrame(
        {"id": pd.Series([np.int32(4), np.float32(0.5), np.int64(4)], dtype=object)}
    )
    encoder = FrameEncoder(categorical=["id"]).fit(frame)
    encoder.save(tmp_path / "encoder")
    assert FrameEncoder.load(tmp_path / "encoder").transform(frame).indices[0].tolist() == [
        1,
        2,
        1,
    ]


def test_another_version_and_edited_settings_are_refused(encoder, tmp_path):
    encoder.save(tmp_path / "e")
    path = tmp_path / "e/settings.json"
    content = json.loads(path.read_text())
    for change, words in (
        ({"format": "data.encoder 99"}, "settings.json is of another version"),
        ({"kinds": []}, "settings.json was changed"),
        ({"scales": []}, "settings.json was changed"),
        ({"format": ["a list"]}, "settings.json is of another version or kind"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            FrameEncoder.load(tmp_path / "e")
    path.write_bytes(json.dumps(content).encode()[:-9])
    with pytest.raises(ValueError, match="settings.json is not a whole file"):
        FrameEncoder.load(tmp_path / "e")


def test_the_settings_are_json_that_others_read(encoder, tmp_path):
    encoder.save(tmp_path / "e")

    def refuse(name):
        raise ValueError(name)

    json.loads((tmp_path / "e/settings.json").read_text(), parse_constant=refuse)


def test_fingerprints_tell_encoders_apart(encoder, frame):
    others = [frame.assign(age=[20.0, 41.0, 1]), frame.assign(city=["Oslo", None, "Oslo"])]
    others += [frame.assign(tags=[["x", "z"], [], ["x"]])]
    new = [FrameEncoder(["age"], ["city"], ["tags"], "click").fit(f) for f in [frame, *others]]
    assert new[0].fingerprint() == encoder.fingerprint()
    assert len({e.fingerprint() for e in new}) == 4


def test_an_unfitted_encoder_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="fit"):
        FrameEncoder(dense=["age"]).save(tmp_path / "encoder")
