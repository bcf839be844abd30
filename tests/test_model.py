"""The notebook's models, against naive loops over single numbers, PyTorch's own operators and published counts."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import notebook_definitions
from dlrm_utils import CRITEO_KAGGLE_TABLE_SIZES, to_offsets

book = notebook_definitions.load()
TABLE_SIZES = [5, 3, 4]
bag_lists = st.lists(st.tuples(*[st.lists(st.integers(0, size - 1), max_size=4) for size in TABLE_SIZES]), min_size=1, max_size=6)


def small_model(self_interaction=False):
    torch.manual_seed(0)
    return book.DLRM(TABLE_SIZES, 4, bottom_mlp=[6, 5], top_mlp=[7], num_dense=3, self_interaction=self_interaction)


def batch_of(rows, seed=0):
    """dense, indices and offsets of rows of bags, one bag a table."""
    dense = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(seed))
    pairs = [to_offsets([row[t] for row in rows]) for t in range(len(TABLE_SIZES))]
    return dense, [indices for indices, _ in pairs], [offsets for _, offsets in pairs]


def naive_layers(layers, values):
    """An MLP over Python floats: every multiplication written out."""
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            values = [sum(w * v for w, v in zip(weights, values)) + bias
                      for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist())]
        else:
            assert isinstance(layer, torch.nn.ReLU)
            values = [max(v, 0.0) for v in values]
    return values


def naive_dlrm(model, dense, row, self_interaction=False):
    """One impression through DLRM, by loops."""
    vectors = [naive_layers(model.bottom, dense.tolist())]
    for table, bag in zip(model.tables, row):
        weights = table.weight.tolist()
        vectors.append([sum(weights[i][d] for i in bag) for d in range(table.embedding_dim)])
    products = []
    for j in range(len(vectors)):
        for k in range(j + 1 if self_interaction else j):
            products.append(sum(a * b for a, b in zip(vectors[j], vectors[k])))
    (logit,) = naive_layers(model.top, vectors[0] + products)
    return logit


@settings(deadline=None)
@given(bag_lists, st.booleans())
def test_dlrm_equals_naive_loops_for_any_bags(rows, self_interaction):
    model = small_model(self_interaction)
    dense, indices, offsets = batch_of(rows)
    logits = model(dense, indices, offsets)
    assert logits.shape == (len(rows),)
    for n, row in enumerate(rows):
        assert math.isclose(logits[n].item(), naive_dlrm(model, dense[n], row, self_interaction), rel_tol=1e-4, abs_tol=1e-5)


def test_lookups_and_gradients_equal_pytorchs_functional_operators():
    model = small_model()
    rows = [([0, 1, 1], [2], []), ([], [0, 2], [3]), ([4], [], [1, 1])]
    dense, indices, offsets = batch_of(rows)
    model(dense, indices, offsets).sum().backward()
    weights = [table.weight.detach().clone().requires_grad_() for table in model.tables]
    bags = [torch.nn.functional.embedding_bag(i, w, o, mode="sum") for i, w, o in zip(indices, weights, offsets)]
    vectors = torch.stack([model.bottom(dense), *bags], 1)
    pairs = torch.einsum("bjd,bkd->bjk", vectors, vectors)[:, *zip(*[(j, k) for j in range(4) for k in range(j)])]
    model.top(torch.cat([vectors[:, 0], pairs], 1)).sum().backward()
    for table, weight in zip(model.tables, weights):
        assert table.weight.grad.is_sparse
        assert torch.allclose(table.weight.grad.to_dense(), weight.grad, atol=1e-6)


@settings(deadline=None)
@given(bag_lists)
def test_logistic_regression_and_matrix_factorization_equal_their_formulas(rows):
    dense, indices, offsets = batch_of(rows)
    logistic = book.LogisticRegression(TABLE_SIZES, num_dense=3)
    factors = book.MatrixFactorization(TABLE_SIZES, 2)
    with torch.no_grad():
        for parameter in [*logistic.parameters(), *factors.parameters()]:
            parameter.uniform_(-1, 1)
    for n, row in enumerate(rows):
        effect = sum(logistic.tables[t].weight[i, 0].item() for t in range(3) for i in row[t])
        linear = sum(w * x for w, x in zip(logistic.linear.weight[0].tolist(), dense[n].tolist())) + logistic.linear.bias.item()
        assert math.isclose(logistic(dense, indices, offsets)[n].item(), effect + linear, rel_tol=1e-4, abs_tol=1e-5)
        user, item = [factors.tables[t].weight[row[t]].sum(0) for t in range(2)]
        biases = sum(factors.biases[t].weight[row[t]].sum() for t in range(2)) + factors.constant
        expected = (user @ item + biases).item()
        assert math.isclose(factors(dense, indices, offsets)[n].item(), expected, rel_tol=1e-4, abs_tol=1e-5)


def test_the_hand_typed_impression():
    model = book.by_hand_model()
    row = (book.liked_ids, [book.film_id], [book.hour_id])
    logit = naive_dlrm(model, torch.log1p(book.dense_row), row)
    assert math.isclose(logit, 1.408, abs_tol=1e-3) and round(1 / (1 + math.exp(-logit)), 2) == 0.80


def test_published_parameter_counts():
    with torch.device("meta"):
        kaggle = book.DLRM(CRITEO_KAGGLE_TABLE_SIZES, 16, [512, 256, 64], [512, 256])
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    assert (count(kaggle), count(kaggle.tables), count(kaggle.bottom), count(kaggle.top)) == (540_677_217, 540_201_232, 155_984, 320_001)
    assert kaggle.top[0].in_features == 367


@pytest.mark.parametrize("width, self_interaction, inputs", [(16, False, 367), (128, False, 479), (128, True, 506)])
def test_the_width_of_the_top_mlp(width, self_interaction, inputs):
    assert book.DLRM([3] * 26, width, [8], [8], self_interaction=self_interaction).top[0].in_features == inputs


def test_the_class_is_as_short_as_promised():
    cell = next(cell for cell in notebook_definitions.code_cells() if "class DLRM(" in notebook_definitions.source(cell))
    assert len([line for line in notebook_definitions.source(cell).splitlines() if line.strip()]) <= 45


def test_predict_does_not_depend_on_the_chunk_and_leaves_no_gradient():
    model = small_model()
    dense, indices, offsets = batch_of([([0], [1, 1], []), ([], [2], [0, 3]), ([4, 4], [], [])] * 5)
    batch = book.dlrm_utils.Batch(dense, indices, offsets, None)
    whole, pieces = book.predict(model, batch), book.predict(model, batch, chunk=4)
    assert whole.shape == (15,) and np.allclose(whole, pieces, atol=1e-6)
    assert np.allclose(whole, torch.sigmoid(model(dense, indices, offsets)).detach(), atol=1e-6)
