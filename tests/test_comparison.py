"""The rivals against independent implementations; the benchmarks' comparison against loops."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.sparse import hstack
from scipy.stats import ttest_ind
from sklearn import linear_model
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import comparison
import learning_rates
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


@pytest.mark.parametrize("name", [*shared.MODELS, shared.PUBLISHED])
def test_every_model_takes_empty_bags_and_learns_sparsely(name):
    batch, bags = random_batch()
    model = shared.model_makers(4, [6], [6])[name](SIZES, num_dense=4)
    loss = binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels)
    loss.backward()
    for table, column in zip(model.tables, bags):
        assert table.weight.grad.is_sparse
        assert set(table.weight.grad.coalesce().indices()[0].tolist()) == {
            i for bag in column for i in bag
        }


def reference_dlrm(model, batch, bags, bottom):
    """Logits of a DLRM with the model's tables and top MLP behind a bottom MLP of its own."""
    logits = []
    for b, dense in enumerate(batch.dense):
        vectors = [bottom(dense)]
        vectors += [table.weight[column[b]].sum(0) for table, column in zip(model.tables, bags)]
        pairs = [vectors[j] @ vectors[k] for j in range(len(vectors)) for k in range(j)]
        x = torch.cat([vectors[0], torch.stack(pairs)])
        first, _, last = model.top
        logits.append(last(torch.relu(first(x))))
    return torch.cat(logits)


@pytest.mark.parametrize("published", [False, True])
def test_the_bottom_mlp_ends_in_a_relu_where_the_published_form_is_asked_for(notebook, published):
    batch, bags = random_batch()
    sizes = {"bottom_mlp": [6], "top_mlp": [7], "num_dense": 4}
    model = randomized(notebook.DLRM(SIZES, 5, **sizes, relu_after_bottom=published))
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)] + [nn.ReLU()] * published
    bottom = nn.Sequential(*layers)
    bottom.load_state_dict(model.bottom.state_dict())
    with torch.no_grad():
        expected = reference_dlrm(model, batch, bags, bottom)
        assert (bottom(batch.dense) < 0).any() != published  # so that a ReLU would be noticed
    assert torch.allclose(logits(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_the_published_form_is_an_option_and_not_the_default(notebook):
    torch.manual_seed(0)
    default = notebook.DLRM(SIZES, 5, [6], [7], num_dense=4)
    assert isinstance(default.bottom[-1], nn.Linear)


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


# ---- The benchmarks' comparison ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*shared.MODELS, shared.PUBLISHED])
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad"])
def test_a_stacked_model_learns_the_same(name, optimizer, toy):
    torch.manual_seed(0)
    model = shared.model_makers(4, [8], [8])[name](toy.table_sizes)
    twin = shared.stacked(copy.deepcopy(model))
    assert not any(isinstance(p, shared.notebook.EmbeddingTables) for p in twin.modules())
    losses = [
        shared.notebook.train(
            m,
            toy.batch,
            toy.train[:2_000],
            getattr(torch.optim, optimizer)(m.parameters(), 0.05),
            100,
        )
        for m in (model, twin)
    ]
    assert np.allclose(*losses, atol=1e-5) and losses[0][0] != losses[0][-1]


def new_dlrm(notebook, toy):
    torch.manual_seed(0)
    model = notebook.DLRM(toy.table_sizes, 4, [8], [8])
    return model, torch.optim.Adagrad(model.parameters(), lr=0.02)


def test_the_curve_agrees_with_the_losses_and_with_evaluate(notebook, toy):
    rows, validation = toy.train[:39_500], toy.batch(toy.validation)
    model, optimizer = new_dlrm(notebook, toy)
    losses = notebook.train(model, toy.batch, rows, optimizer, 1000)
    model, optimizer = new_dlrm(notebook, toy)
    curve = shared.learning_curve(model, optimizer, toy.batch, rows, validation, 1000)
    assert list(curve["rows"]) == [*range(5_000, 36_000, 5_000), 39_500]
    by_point = np.reshape(losses, (8, 5))[:7].mean(1)
    assert np.allclose(curve["training log loss"][:7], by_point, atol=1e-5)
    last = notebook.evaluate(model, validation)["log_loss"]
    assert curve["validation log loss"].iloc[-1] == last


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """7,000 toy clicks: the programs take a folder's name, since each run has its own process."""
    return str(shared.toy_data(tmp_path_factory.mktemp("small"), 7_000)[0].path)


def test_training_validation_and_test_rows_are_three_sets(small_folder):
    """Told apart by what is in the rows."""
    clicks = shared.clicks_of(small_folder)
    parts = clicks.get_batch(clicks.train), clicks.validation, clicks.test
    rows = [
        set(map(tuple, torch.cat([part.dense, torch.stack(part.indices, 1)], 1).tolist()))
        for part in parts
    ]
    assert [len(part) for part in rows] == [len(part.labels) for part in parts] == [6000, 500, 500]
    assert len(set.union(*rows)) == 7_000


@pytest.fixture
def small_layers(monkeypatch):
    monkeypatch.setitem(shared.LAYERS, "tiny", ([8], [8]))


def test_a_searched_rate_is_scored_on_the_validation_rows(notebook, small_folder, small_layers):
    clicks = shared.clicks_of(small_folder)
    loss = learning_rates.validation_loss(small_folder, "tiny", "Adagrad", "DLRM", 0.02)
    model, _ = shared.one_epoch(clicks, "tiny", "DLRM", "Adagrad", 0.02)
    assert loss == round(notebook.evaluate(model, clicks.validation)["log_loss"], 5)
    assert loss != round(notebook.evaluate(model, clicks.test)["log_loss"], 5)


def test_a_rate_at_which_training_runs_away_is_infinitely_bad(small_folder, small_layers):
    assert learning_rates.validation_loss(small_folder, "tiny", "SGD", "DCN", 1e6) == np.inf


def test_dead_outputs_are_counted():
    batch, _ = random_batch(rows=50)
    torch.manual_seed(0)
    model = shared.model_makers(4, [6], [6])[shared.PUBLISHED](SIZES, num_dense=4)
    with torch.no_grad():
        for parameter in model.bottom.parameters():
            parameter.abs_()
        assert shared.dead_outputs(model, batch._replace(dense=batch.dense.abs())) == 0
        model.bottom[2].bias[1] = -1000  # its ReLU lets nothing through
        assert shared.dead_outputs(model, batch._replace(dense=batch.dense.abs())) == 1
        model.bottom[0].bias[:] = -1000  # a dead hidden layer: all outputs are constants
        assert shared.dead_outputs(model, batch._replace(dense=batch.dense.abs())) == 4


def test_a_run_of_the_race_says_what_it_was_and_is_repeated_to_the_digit(
    small_folder, small_layers
):
    row, curve = comparison.one_run(small_folder, "tiny", shared.PUBLISHED, "Adagrad", 0.02, 1)
    again, _ = comparison.one_run(small_folder, "tiny", shared.PUBLISHED, "Adagrad", 0.02, 1)
    other, _ = comparison.one_run(small_folder, "tiny", shared.PUBLISHED, "Adagrad", 0.02, 2)
    assert row == again and row["log_loss"] != other["log_loss"]
    assert (row["model"], row["optimizer"], row["seed"]) == (shared.PUBLISHED, "Adagrad", 1)
    assert 0 <= row["dead_outputs"] <= 16 and len(curve) == 8
    assert (
        "dead_outputs"
        not in comparison.one_run(small_folder, "tiny", "plain MLP", "SGD", 0.1, 0)[0]
    )
