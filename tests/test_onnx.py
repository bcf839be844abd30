"""The exported model in onnxruntime against PyTorch, at other batch and bag sizes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dlrm_utils import Batch, export_onnx, to_offsets

TABLE_SIZES = [50, 7, 300]
NAMES = ["dense", *[f"indices_{t}" for t in range(3)], *[f"offsets_{t}" for t in range(3)]]


def random_batch(rows, max_bag, seed):
    rng = np.random.default_rng(seed)
    pairs = [
        to_offsets(
            [rng.integers(0, size, rng.integers(0, max_bag + 1)).tolist() for _ in range(rows)]
        )
        for size in TABLE_SIZES
    ]
    return Batch(torch.randn(rows, 4), [i for i, _ in pairs], [o for _, o in pairs])


@pytest.fixture(scope="module")
def model_and_session(notebook, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = notebook.DLRM(TABLE_SIZES, 8, [16], [16], num_dense=4)
    free = ({0: "batch"}, [{0: f"ids_{t}"} for t in range(3)], [{0: "batch"}] * 3)
    export_onnx(model, random_batch(5, 3, seed=0)[:3], path, NAMES, free)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    return model, onnxruntime.InferenceSession(path)


@pytest.mark.parametrize(
    "rows, max_bag", [(1, 0), (1, 1), (1, 9), (2, 0), (7, 4), (1000, 1), (1000, 20)]
)
def test_onnxruntime_says_what_pytorch_says(notebook, model_and_session, rows, max_bag):
    model, session = model_and_session
    batch = random_batch(rows, max_bag, seed=rows + max_bag)
    with torch.no_grad():
        expected = model(batch.dense, batch.indices, batch.offsets).numpy()
    inputs = [batch.dense, *batch.indices, *batch.offsets]
    logits = session.run(
        None, {name: tensor.numpy() for name, tensor in zip(NAMES, inputs, strict=True)}
    )[0]
    assert logits.shape == (rows,) and np.abs(logits - expected).max() < 1e-5


@pytest.mark.slow
def test_the_file_holds_no_loop_over_bags(notebook, model_and_session, tmp_path):
    model, _ = model_and_session
    free = ({0: "batch"}, [{0: f"ids_{t}"} for t in range(3)], [{0: "batch"}] * 3)
    export_onnx(model, random_batch(5, 3, seed=0)[:3], tmp_path / "model.onnx", NAMES, free)
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Gather" in operators and "Loop" not in operators


def test_a_mean_is_refused_rather_than_exported_as_a_sum(tmp_path):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.EmbeddingBag(5, 2, mode="mean")

        def forward(self, dense, indices, offsets):
            return self.table(indices, offsets).sum(1)

    with pytest.raises(Exception, match="mode="):
        export_onnx(
            Mean(),
            (torch.zeros(2, 1), torch.tensor([1, 2, 3]), torch.tensor([0, 2])),
            tmp_path / "mean.onnx",
            ["dense", "indices", "offsets"],
            ({0: "batch"}, {0: "ids"}, {0: "batch"}),
        )
    assert list(tmp_path.iterdir()) == []
