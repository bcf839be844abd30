"""The exported model in onnxruntime against PyTorch, at other batch and bag sizes."""

import logging
import warnings

import numpy as np
import onnxruntime
import pytest
import torch

from dlrm_utils import Batch, to_offsets

TABLE_SIZES = [50, 7, 300]
NAMES = ["dense", *[f"indices_{t}" for t in range(3)], *[f"offsets_{t}" for t in range(3)]]
FREE_SIZES = ({0: "batch"}, [{0: f"ids_{t}"} for t in range(3)], [{0: "batch"}] * 3)


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
    """Exported as appendix A does it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = notebook.DLRM(TABLE_SIZES, 8, [16], [16], num_dense=4)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model.eval(),
            random_batch(5, 3, seed=0)[:3],
            path,
            dynamo=True,
            dynamic_shapes=FREE_SIZES,
            input_names=NAMES,
            external_data=False,
            verbose=False,
        )
    logging.disable(logging.NOTSET)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    return model, onnxruntime.InferenceSession(path)


# The first case waits for the export, some five seconds.
@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, max_bag", [(1, 0), (1, 1), (1, 9), (2, 0), (7, 4), (1000, 1), (1000, 20)]
)
def test_onnxruntime_says_what_pytorch_says(model_and_session, rows, max_bag):
    model, session = model_and_session
    batch = random_batch(rows, max_bag, seed=rows + max_bag)
    with torch.no_grad():
        expected = model(batch.dense, batch.indices, batch.offsets).numpy()
    inputs = [batch.dense, *batch.indices, *batch.offsets]
    tensors = {name: tensor.numpy() for name, tensor in zip(NAMES, inputs, strict=True)}
    logits = session.run(None, tensors)[0]
    assert logits.shape == (rows,) and np.abs(logits - expected).max() < 1e-5
