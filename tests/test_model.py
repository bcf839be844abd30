"""The notebook's models against loops over numbers, PyTorch's operators, published counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import people
from dlrm_utils import CRITEO_KAGGLE_TABLE_SIZES, Batch, to_offsets

TABLE_SIZES = [5, 3, 4]
bag_lists = st.lists(
    st.tuples(*[st.lists(st.integers(0, size - 1), max_size=4) for size in TABLE_SIZES]),
    min_size=1,
    max_size=6,
)


def small_model(notebook, self_interaction=False):
    torch.manual_seed(0)
    return notebook.DLRM(
        TABLE_SIZES,
        4,
        bottom_mlp=[6, 5],
        top_mlp=[7],
        num_dense=3,
        self_interaction=self_interaction,
    )


def batch_of(rows, seed=0):
    """dense, indices and offsets of rows of bags, one bag a table."""
    dense = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(seed))
    pairs = [to_offsets([row[t] for row in rows]) for t in range(len(TABLE_SIZES))]
    return dense, [indices for indices, _ in pairs], [offsets for _, offsets in pairs]


def naive_layers(layers, values):
    """An MLP over Python floats: every multiplication written out."""
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            values = [
                sum(w * v for w, v in zip(weights, values)) + bias
                for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist())
            ]
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


@given(bag_lists, st.booleans())
def test_dlrm_equals_naive_loops_for_any_bags(notebook, rows, self_interaction):
    model = small_model(notebook, self_interaction)
    dense, indices, offsets = batch_of(rows)
    logits = model(dense, indices, offsets)
    assert logits.shape == (len(rows),)
    for n, row in enumerate(rows):
        assert math.isclose(
            logits[n].item(),
            naive_dlrm(model, dense[n], row, self_interaction),
            rel_tol=1e-4,
            abs_tol=1e-5,
        )


def test_lookups_and_gradients_equal_pytorchs_functional_operators(notebook):
    model = small_model(notebook)
    rows = [([0, 1, 1], [2], []), ([], [0, 2], [3]), ([4], [], [1, 1])]
    dense, indices, offsets = batch_of(rows)
    model(dense, indices, offsets).sum().backward()
    weights = [table.weight.detach().clone().requires_grad_() for table in model.tables]
    bags = [
        torch.nn.functional.embedding_bag(i, w, o, mode="sum")
        for i, w, o in zip(indices, weights, offsets)
    ]
    vectors = torch.stack([model.bottom(dense), *bags], 1)
    pairs = torch.einsum("bjd,bkd->bjk", vectors, vectors)[
        :, *zip(*[(j, k) for j in range(4) for k in range(j)])
    ]
    model.top(torch.cat([vectors[:, 0], pairs], 1)).sum().backward()
    for table, weight in zip(model.tables, weights):
        assert table.weight.grad.is_sparse
        assert torch.allclose(table.weight.grad.to_dense(), weight.grad, atol=1e-6)


def additive(model, dense, row):
    """What logistic regression says of one impression, by loops, for the tables that it has."""
    effect = sum(table.weight[i, 0].item() for table, bag in zip(model.tables, row) for i in bag)
    weights, bias = model.linear.weight[0].tolist(), model.linear.bias.item()
    return effect + sum(w * x for w, x in zip(weights, dense.tolist())) + bias


def drawn_anew(model):
    """The model with every weight drawn anew, so that none is 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model


@given(bag_lists)
def test_logistic_regression_and_matrix_factorization_equal_their_formulas(notebook, rows):
    dense, indices, offsets = batch_of(rows)
    logistic = drawn_anew(notebook.LogisticRegression(TABLE_SIZES, num_dense=3))
    factors = drawn_anew(people.MatrixFactorization(TABLE_SIZES, 2, num_dense=3))
    by_logistic = logistic(dense, indices, offsets).tolist()
    by_factors = factors(dense, indices, offsets).tolist()
    for n, row in enumerate(rows):
        expected = additive(logistic, dense[n], row)
        assert math.isclose(by_logistic[n], expected, rel_tol=1e-4, abs_tol=1e-5)
        film, liked = (factors.tables[t].weight[row[t]].sum(0) for t in (0, -1))
        expected = additive(factors.additive, dense[n], row) + (film @ liked).item()
        assert math.isclose(by_factors[n], expected, rel_tol=1e-4, abs_tol=1e-5)


def test_the_hand_typed_impression(notebook):
    model = notebook.hand_model
    row = (notebook.liked_ids, [notebook.film_id], [notebook.hour_id])
    logit = naive_dlrm(model, torch.log1p(notebook.dense_row), row)
    assert math.isclose(logit, 1.408, abs_tol=1e-3)
    assert round(1 / (1 + math.exp(-logit)), 2) == 0.80


def test_published_parameter_counts(notebook):
    with torch.device("meta"):
        kaggle = notebook.DLRM(CRITEO_KAGGLE_TABLE_SIZES, 16, [512, 256, 64], [512, 256])
    parts = [kaggle, kaggle.tables, kaggle.bottom, kaggle.top]
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [540_677_217, 540_201_232, 155_984, 320_001]
    assert [notebook.count(part) for part in parts] == counts
    assert kaggle.top[0].in_features == 367


@pytest.mark.parametrize(
    "width, self_interaction, inputs", [(16, False, 367), (128, False, 479), (128, True, 506)]
)
def test_the_width_of_the_top_mlp(notebook, width, self_interaction, inputs):
    model = notebook.DLRM([3] * 26, width, [8], [8], self_interaction=self_interaction)
    assert model.top[0].in_features == inputs


def test_predict_takes_any_number_of_rows_in_order_and_leaves_no_gradient(notebook):
    """More rows than it takes at once."""
    model = small_model(notebook)
    rows = [([0], [1, 1], []), ([], [2], [0, 3]), ([4, 4], [], [])] * 3_000
    dense, indices, offsets = batch_of(rows)
    probabilities = notebook.predict(model, Batch(dense, indices, offsets, None))
    assert isinstance(probabilities, np.ndarray) and probabilities.shape == (9_000,)
    expected = torch.sigmoid(model(dense, indices, offsets)).detach()
    assert np.allclose(probabilities, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ["DLRM", "LogisticRegression"])
def test_a_table_without_numeric_columns_trains(notebook, name):
    widths = {"embedding_dim": 2, "bottom_mlp": [16], "top_mlp": [16]} if name == "DLRM" else {}
    model = getattr(notebook, name)([3], **widths, num_dense=0)
    ids, starts = torch.tensor([0, 1, 2, 1]), torch.arange(4)
    batch = Batch(torch.zeros(4, 0), [ids], [starts], torch.ones(4))
    before = model.tables[0].weight.detach().clone()
    notebook.fit(model, torch.optim.SGD(model.parameters(), lr=0.5), batch.take, 4, 2)
    assert not torch.equal(before, model.tables[0].weight)
    assert notebook.predict(model, batch).shape == (4,)
