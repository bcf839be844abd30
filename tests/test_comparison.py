"""The rivals against independent implementations; the benchmarks' comparison against loops."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import hstack
from scipy.stats import ttest_ind
from sklearn import linear_model
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder
from torch.nn.functional import binary_cross_entropy_with_logits

import shared
from dlrm_utils import Batch, to_offsets

SIZES = [5, 8, 3]


def random_batch(rows=6, num_dense=4):
    """Ragged bags with repeated ids and empty bags."""
    rng = np.random.default_rng(0)
    bags = [
        [rng.integers(0, size, rng.integers(0, 4)).tolist() for _ in range(rows)] for size in SIZES
    ]
    indices, offsets = zip(*map(to_offsets, bags))
    labels = torch.from_numpy(rng.integers(0, 2, rows).astype(np.float32))
    dense = torch.from_numpy(rng.normal(size=(rows, num_dense)).astype(np.float32))
    return Batch(dense, list(indices), list(offsets), labels), bags


def randomized(model):
    """The model with every weight drawn anew, so that none is 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(*batch[:3])


def test_factorization_machine_equals_the_loop_over_pairs(notebook):
    batch, bags = random_batch()
    model = randomized(notebook.FactorizationMachine(SIZES, 5, num_dense=4))
    result = logits(model, batch)
    for b in range(len(batch.dense)):
        vectors = [x * v for x, v in zip(batch.dense[b], model.dense_vectors.detach())]
        vectors += [
            table.weight.detach()[column[b]].sum(0) for table, column in zip(model.tables, bags)
        ]
        pairs = sum(float(vectors[j] @ vectors[k]) for j in range(len(vectors)) for k in range(j))
        additive = model.additive.linear(batch.dense[b]).item() + sum(
            table.weight[i, 0].item()
            for table, column in zip(model.additive.tables, bags)
            for i in column[b]
        )
        assert math.isclose(result[b].item(), additive + pairs, rel_tol=1e-4, abs_tol=1e-4)


def test_equal_models_pass_for_clear_less_than_once_in_twenty():
    """Appendix B's rule, on 20,000 pairs of three runs from one distribution."""
    rng = np.random.default_rng(0)
    p = ttest_ind(*rng.normal(size=(2, 3, 20_000)), equal_var=False).pvalue
    assert 0.01 < (p < 0.05).mean() < 0.05


def test_complete_separation_of_three_runs_is_luck_once_in_ten():
    one, other = np.random.default_rng(0).normal(size=(2, 3, 20_000))
    apart = (one.max(0) < other.min(0)) | (other.max(0) < one.min(0))
    assert abs(apart.mean() - 0.1) < 0.01


def test_without_a_bias_a_cross_layer_only_scales_its_input(notebook):
    batch, _ = random_batch()
    model = notebook.DCN(SIZES, 2, 2, [3], num_dense=4)
    x0 = x = notebook.side_by_side(model.tables, *batch[:3]).detach()
    for weights in model.cross:
        x = x0 * weights(x) + x
    assert torch.allclose(x * x0[:, :1], x0 * x[:, :1], atol=1e-5)  # the same direction


def test_plain_mlp_equals_its_layers_by_hand(notebook):
    batch, bags = random_batch()
    model = randomized(notebook.PlainMLP(SIZES, 2, [3], num_dense=4))
    first, _, second = model.layers
    model.requires_grad_(False)
    for b, result in enumerate(logits(model, batch)):
        vectors = [table.weight[column[b]].sum(0) for table, column in zip(model.tables, bags)]
        x = torch.cat([batch.dense[b], *vectors])
        hidden = [max(0.0, float(w @ x + c)) for w, c in zip(first.weight, first.bias)]
        expected = float(second.weight[0] @ torch.tensor(hidden) + second.bias)
        assert math.isclose(result.item(), expected, rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_cross_layers_equal_torchrecs_and_the_formula(notebook, layers):
    crossnet = pytest.importorskip("torchrec.modules.crossnet")  # there are builds for Linux only
    batch, _ = random_batch()
    model = randomized(notebook.DCN(SIZES, 2, layers, [3], num_dense=4))
    x0 = torch.cat([batch.dense, model.tables(*batch[1:3]).flatten(1)], dim=1).detach()
    reference = crossnet.VectorCrossNet(x0.shape[1], layers)
    with torch.no_grad():
        for kernel, bias, weights, own in zip(
            reference.kernels, reference.bias, model.cross, model.biases, strict=True
        ):
            kernel.copy_(weights.weight.T)
            bias.copy_(own[:, None])
        crossed, deep = reference(x0), model.deep(x0)
        expected = model.top(torch.cat([crossed, deep], dim=1)).squeeze(1)
    assert torch.allclose(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    for b, row in enumerate(x0):  # and number by number
        x = row.double().tolist()
        for weights, bias in zip(model.cross, model.biases):
            s = sum(w * value for w, value in zip(weights.weight[0].tolist(), x))
            x = [first * s + c + value for first, c, value in zip(row.tolist(), bias.tolist(), x)]
        assert np.allclose(x, crossed[b], rtol=1e-3, atol=1e-3 * max(map(abs, x)))


@pytest.mark.parametrize(
    "name", ["logistic regression", "factorization machine", "plain MLP", "DCN", "DLRM"]
)
def test_every_model_takes_empty_bags_and_learns_sparsely(name):
    batch, bags = random_batch()
    model = shared.five_models(4, [6], [6])[name](SIZES, num_dense=4)
    loss = binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
    loss.backward()
    for table, column in zip(model.tables, bags):
        assert table.weight.grad.is_sparse
        assert set(table.weight.grad.coalesce().indices()[0].tolist()) == {
            i for bag in column for i in bag
        }


@pytest.mark.slow  # four epochs of ours, and an optimum of scikit-learn's
def test_logistic_regression_orders_like_scikit_learns(notebook, toy):
    test = range(toy.test.start, toy.validation.stop)
    torch.manual_seed(0)
    model = notebook.LogisticRegression(toy.table_sizes)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    notebook.train(model, toy.batch, toy.train, optimizer, 256, num_epochs=4)
    ours = notebook.evaluate(model, toy.batch(test))["auc"]
    one_hot = OneHotEncoder(handle_unknown="ignore").fit(toy.sparse[: toy.train.stop])

    def columns(rows):
        dense = toy.batch(rows).dense.numpy()
        return hstack([one_hot.transform(toy.sparse[rows.start : rows.stop]), dense]).tocsr()

    reference = linear_model.LogisticRegression(C=0.1, max_iter=300)
    reference.fit(columns(toy.train), toy.labels[: toy.train.stop])
    theirs = reference.predict_proba(columns(test))[:, 1]
    assert abs(ours - roc_auc_score(toy.labels[test.start : test.stop], theirs)) < 0.005


def test_calibration_groups_against_scikit_learn_and_a_loop():
    rng = np.random.default_rng(0)
    probabilities = rng.random(1000)
    labels = rng.random(1000) < probabilities**2
    groups = shared.calibration_groups(labels, probabilities)
    shares, means = calibration_curve(labels, probabilities, n_bins=10, strategy="quantile")
    assert np.allclose(groups["share"], shares) and np.allclose(groups["prediction"], means)
    ranked = sorted(zip(probabilities, labels))
    for k in range(10):
        part = ranked[100 * k : 100 * (k + 1)]
        assert math.isclose(groups["prediction"][k], sum(p for p, _ in part) / 100)
        assert math.isclose(groups["share"][k], sum(y for _, y in part) / 100)


def new_dlrm(notebook, toy):
    torch.manual_seed(0)
    model = notebook.DLRM(toy.table_sizes, 4, [8], [8])
    return model, torch.optim.Adagrad(model.parameters(), lr=0.02)


def test_the_curve_agrees_with_the_losses_and_with_evaluate(notebook, toy):
    rows, validation = toy.train[:40_000], toy.batch(toy.validation)
    model, optimizer = new_dlrm(notebook, toy)
    losses = notebook.train(model, toy.batch, rows, optimizer, 1000)
    model, optimizer = new_dlrm(notebook, toy)
    curve = shared.learning_curve(model, optimizer, toy.batch, rows, validation, 1000)
    last = notebook.evaluate(model, validation)
    assert list(curve["rows"]) == [5000 * k for k in range(1, 9)]
    assert np.allclose(curve["training log loss"], np.reshape(losses, (8, 5)).mean(1), atol=1e-5)
    assert curve["validation log loss"].iloc[-1] == last["log_loss"]
    assert curve["validation accuracy"].iloc[-1] == last["accuracy"]


@pytest.mark.slow  # eight trainings
def test_compare_runs_every_pair_the_same_each_time(toy):
    rates = pd.Series({("DCN", "SGD"): 0.01, ("DLRM", "Adagrad"): 0.02})
    new = shared.five_models(4, [8], [8]).items()
    models = {name: functools.partial(make, toy.table_sizes) for name, make in new}
    validation, test = toy.batch(toy.validation[:500]), toy.batch(toy.test)
    arguments = models, rates, toy.batch, toy.train[:8_000], validation, test, 500, [0, 1]
    scores, curves, groups = shared.compare(*arguments)
    again, _, _ = shared.compare(*arguments)
    assert list(zip(scores["model"], scores["optimizer"], scores["seed"])) == [
        ("DCN", "SGD", 0),
        ("DCN", "SGD", 1),
        ("DLRM", "Adagrad", 0),
        ("DLRM", "Adagrad", 1),
    ]
    assert scores.drop(columns="seconds").equals(again.drop(columns="seconds"))
    assert len(curves) == 4 * 8 and len(groups) == 4 * 10
    assert scores["log_loss"].nunique() == 4
    table = shared.table_of(scores)
    assert list(table.index) == [("Adagrad", "DLRM"), ("SGD", "DCN")]
    assert math.isclose(table["auc"].iloc[0], scores.query("model == 'DLRM'")["auc"].mean())


def test_share_of_the_way_by_hand():
    runs = [("Adagrad", "logistic regression", 0.5), ("Adagrad", "DLRM", 0.4), ("SGD", "DLRM", 0.3)]
    scores = pd.DataFrame(runs, columns=["optimizer", "model", "log_loss"]).assign(seed=0)
    way = shared.share_of_the_way(scores, best_log_loss=0.3)
    assert math.isclose(way.loc[0, "DLRM"], 0.5) and way.loc[0, "logistic regression"] == 0
