"""The exported files against PyTorch: bags of every shape, bad ids and offsets, other models."""

import logging
import warnings

import numpy as np
import pytest
import torch

from dlrm_utils import Batch, to_offsets
from test_stacked import unstacked_state

TABLE_SIZES = [50, 7, 300]


def batch_of(bags, rows):
    """A Batch with the given bags of each table, and four dense numbers."""
    pairs = [to_offsets(table) for table in bags]
    torch.manual_seed(rows)
    return Batch(torch.randn(rows, 4), [i for i, _ in pairs], [o for _, o in pairs])


def random_batch(rows, max_bag, seed, sizes=TABLE_SIZES):
    rng = np.random.default_rng(seed)
    draw = [
        [rng.integers(0, size, rng.integers(0, max_bag + 1)).tolist() for _ in range(rows)]
        for size in sizes
    ]
    return batch_of(draw, rows)


def exported(notebook, model, batch, folder):
    """Appendix A's export of a model: what onnxruntime and what PyTorch opens."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        notebook.export(model, batch, folder / "model")
        opened = torch.export.load(folder / "model.pt2").module()
    logging.disable(logging.NOTSET)
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "model.pt2"]
    return notebook.open_onnx(folder / "model.onnx"), opened


def assert_same(model, by_onnx, opened, batch):
    with torch.no_grad():
        expected = model(*batch[:3])
        assert torch.equal(opened(*batch[:3]), expected)
    logits = by_onnx(*batch[:3])
    assert logits.shape == expected.shape
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def files(notebook, tmp_path_factory):
    """A model of three tables, exported with a batch that has no rows at all."""
    torch.manual_seed(0)
    model = notebook.DLRM(TABLE_SIZES, 8, [16], [16], num_dense=4)
    nothing = batch_of([[], [], []], 0)
    return model, *exported(notebook, model, nothing, tmp_path_factory.mktemp("onnx"))


# The first case waits for the export, some five seconds.
@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, max_bag", [(0, 0), (1, 0), (1, 1), (1, 9), (2, 0), (7, 4), (1000, 1), (1000, 20)]
)
def test_the_files_say_what_pytorch_says(files, rows, max_bag):
    assert_same(*files, random_batch(rows, max_bag, seed=rows + max_bag))


@pytest.mark.parametrize(
    "bags",
    [
        [[], [3]],
        [[3], []],
        [[], [], [4, 4, 2], [], [], [1], []],
        [[1], [], [], [], [2]],
        [[], [], []],
        [[5] * 40],
    ],
)
def test_empty_bags_may_lead_trail_and_repeat(files, bags):
    assert_same(*files, batch_of([bags, bags[::-1], [[0]] * len(bags)], len(bags)))


def test_a_million_ids_lose_no_digits(files):
    """One table's first bag holds nearly all ids, and small bags follow it."""
    model, by_onnx, _ = files
    rng = np.random.default_rng(0)
    ids, starts = torch.from_numpy(rng.integers(0, 50, 1_000_000)), torch.tensor([0, 999_990])
    starts = torch.cat([starts, torch.arange(999_991, 1_000_000)])
    few = [torch.zeros(11, dtype=torch.int64)] * 2
    batch = Batch(torch.zeros(11, 4), [ids, *few], [starts, *[torch.arange(11)] * 2])
    logits = by_onnx(*batch[:3])[1:]
    last = batch_of([ids[999_990:, None].tolist(), [[0]] * 10, [[0]] * 10], 10)
    alone = by_onnx(torch.zeros(10, 4), *last[1:3])
    assert torch.allclose(logits, alone, rtol=0, atol=1e-6)


@pytest.mark.slow  # a large export
def test_no_thread_adds_to_what_another_adds_to(notebook, files, tmp_path):
    """Threads that add to one bag at once can lose an id; four threads say what one says."""
    import onnxruntime

    model, by_onnx, _ = files
    exported(notebook, model, random_batch(2, 2, 0), tmp_path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    batch = random_batch(40, 20_000, seed=1)
    names = [entry.name for entry in session.get_inputs()]
    tensors = [batch.dense, *batch.indices, *batch.offsets]
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    for _ in range(10):
        assert np.allclose(session.run(None, feed)[0], by_onnx(*batch[:3]), rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, -7, -8, -(2**63), 7, 2**62])
def test_an_id_outside_its_table_is_an_error(files, bad):
    _, by_onnx, opened = files
    batch = random_batch(5, 3, seed=2)
    batch.indices[1][0] = bad  # after the batch's own check
    with pytest.raises(Exception, match="out of data bounds"):
        by_onnx(*batch[:3])
    with pytest.raises(RuntimeError, match="not in the valid range"):
        opened(*batch[:3])


BAD_OFFSETS = {
    "fall": [0, 2, 1],
    "fall below 0": [0, -1, 2],
    "fall at the end": [0, 4, 3],
    "fall from beyond": [0, 9, 1],
    "start late": [1, 2, 3],
    "start below 0": [-1, 0, 2],
    "lie beyond the ids": [0, 2, 5],
    "lie far beyond": [0, 2**40, 2**62],
}


@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
@pytest.mark.parametrize("table", range(3))
def test_offsets_that_cannot_be_are_an_error(files, table, offsets):
    """PyTorch by itself reads memory that is not the table's where offsets fall."""
    _, by_onnx, opened = files
    dense, indices, starts, _ = batch_of([[[1, 2], [3], [4]]] * 3, 3)
    assert torch.allclose(by_onnx(dense, indices, starts), opened(dense, indices, starts))
    starts[table] = torch.tensor(offsets)
    for way in (by_onnx, opened):
        with pytest.raises(Exception, match="out of data bounds|offsets"):
            way(dense, indices, starts)


@pytest.mark.parametrize("offsets", [[0, 5, 0], [0, 1], [1, 0]])
def test_offsets_into_no_ids_at_all_are_an_error(files, offsets):
    _, by_onnx, opened = files
    rows = len(offsets)
    dense, indices, starts, _ = batch_of([[[]] * rows] * 3, rows)
    starts[0] = torch.tensor(offsets)
    for way in (by_onnx, opened):
        with pytest.raises(Exception, match="out of data bounds|offsets"):
            way(dense, indices, starts)


# Each waits for an export of some seconds.
@pytest.mark.slow
@pytest.mark.parametrize("sizes, num_dense", [([5], 4), ([4, 9], 0), ([3] * 26, 13)])
def test_any_number_of_tables_and_dense_numbers(notebook, tmp_path, sizes, num_dense):
    torch.manual_seed(0)
    model = notebook.DLRM(sizes, 8, [16], [16], num_dense=num_dense)
    for rows, max_bag in [(1, 1), (7, 3)]:
        batch = random_batch(rows, max_bag, rows, sizes)
        batch = batch._replace(dense=torch.randn(rows, num_dense))
        if rows == 1:
            files = exported(notebook, model, batch, tmp_path)
        assert_same(model, *files, batch)


# Waits for an export of some seconds.
@pytest.mark.slow
def test_a_stacked_model_is_exported_with_its_tables_apart(notebook, tmp_path):
    torch.manual_seed(0)
    stacked = notebook.StackedDLRM(TABLE_SIZES, 8, [16], [16], num_dense=4)
    apart = notebook.DLRM(TABLE_SIZES, 8, [16], [16], num_dense=4)
    apart.load_state_dict(unstacked_state(stacked.state_dict(), TABLE_SIZES))
    by_onnx, _ = exported(notebook, apart, random_batch(5, 3, 0), tmp_path)
    batch = random_batch(100, 5, seed=3)
    with torch.no_grad():
        expected = stacked(*batch[:3])
    assert torch.allclose(by_onnx(*batch[:3]), expected, atol=1e-5)


# Waits for an export of some seconds.
@pytest.mark.slow
def test_tables_of_eight_bits_are_near_and_smaller(notebook, files, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnxruntime.quantization import quantize_dynamic

    torch.manual_seed(0)
    model = notebook.DLRM([5000, 7, 300], 8, [16], [16], num_dense=4)
    batch = random_batch(200, 4, seed=4)
    by_onnx, _ = exported(notebook, model, batch, tmp_path)
    whole = onnx.load(tmp_path / "model.onnx")
    whole.graph.ClearField("value_info")
    quantize_dynamic(whole, tmp_path / "small.onnx", op_types_to_quantize=["Gather"])
    small = notebook.open_onnx(tmp_path / "small.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("small.onnx", "model.onnx")]
    assert sizes[0] < 0.6 * sizes[1]
    logits = by_onnx(*batch[:3])
    assert (small(*batch[:3]) - logits).abs().max() < 0.2 * logits.std()
    batch.indices[1][0] = -1
    with pytest.raises(Exception, match="out of data bounds"):
        small(*batch[:3])
