"""Section 10: each opponent against an independent implementation, the metrics against loops, the loop against itself."""
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import hstack
from sklearn import linear_model
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

import notebook_definitions
from dlrm_utils import Batch, preprocess_criteo, to_offsets, write_toy_criteo

book = notebook_definitions.load()
SIZES = [5, 8, 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    raw = tmp_path_factory.mktemp("comparison") / "toy.txt"
    write_toy_criteo(raw, 60_000)
    return preprocess_criteo(raw, raw.with_suffix(".npz"), min_count=10, progress=False)


def random_batch(rows=6, num_dense=4):
    """Ragged bags with repeated ids and empty bags."""
    rng = np.random.default_rng(0)
    bags = [[rng.integers(0, size, rng.integers(0, 4)).tolist() for _ in range(rows)] for size in SIZES]
    indices, offsets = zip(*map(to_offsets, bags))
    labels = torch.from_numpy(rng.integers(0, 2, rows).astype(np.float32))
    return Batch(torch.from_numpy(rng.normal(size=(rows, num_dense)).astype(np.float32)), list(indices), list(offsets), labels), bags


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


def test_factorization_machine_equals_the_loop_over_pairs():
    batch, bags = random_batch()
    model = randomized(book.FactorizationMachine(SIZES, 5, num_dense=4))
    result = logits(model, batch)
    for b in range(len(batch.dense)):
        vectors = [x * v for x, v in zip(batch.dense[b], model.dense_vectors.detach())]
        vectors += [table.weight.detach()[column[b]].sum(0) for table, column in zip(model.tables, bags)]
        pairs = sum(float(vectors[j] @ vectors[k]) for j in range(len(vectors)) for k in range(j))
        additive = model.additive.linear(batch.dense[b]).item() + sum(
            table.weight[i, 0].item() for table, column in zip(model.additive.tables, bags) for i in column[b])
        assert math.isclose(result[b].item(), additive + pairs, rel_tol=1e-4, abs_tol=1e-4)


def test_plain_mlp_equals_its_layers_by_hand():
    batch, bags = random_batch()
    model = randomized(book.PlainMLP(SIZES, 2, [3], num_dense=4))
    first, _, second = model.layers
    for b, result in enumerate(logits(model, batch)):
        x = torch.cat([batch.dense[b]] + [table.weight.detach()[column[b]].sum(0) for table, column in zip(model.tables, bags)])
        hidden = [max(0.0, float(w @ x + c)) for w, c in zip(first.weight.detach(), first.bias.detach())]
        assert math.isclose(result.item(), float((second.weight[0] @ torch.tensor(hidden) + second.bias).detach()), rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_cross_layers_equal_torchrecs_and_the_formula(layers):
    crossnet = pytest.importorskip("torchrec.modules.crossnet")        # there are builds for Linux only
    batch, _ = random_batch()
    model = randomized(book.DCN(SIZES, 2, layers, [3], num_dense=4))
    x0 = torch.cat([batch.dense, model.tables(*batch[1:3]).flatten(1)], dim=1).detach()
    reference = crossnet.VectorCrossNet(x0.shape[1], layers)
    with torch.no_grad():
        for kernel, bias, weights, own in zip(reference.kernels, reference.bias, model.cross, model.biases, strict=True):
            kernel.copy_(weights.weight.T)
            bias.copy_(own[:, None])
        crossed, deep = reference(x0), model.deep(x0)
        expected = model.top(torch.cat([crossed, deep], dim=1)).squeeze(1)
    assert torch.allclose(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    for b, row in enumerate(x0):                                               # and number by number
        x = row.double().tolist()
        for weights, bias in zip(model.cross, model.biases):
            s = sum(w * value for w, value in zip(weights.weight[0].tolist(), x))
            x = [first * s + c + value for first, c, value in zip(row.tolist(), bias.tolist(), x)]
        assert np.allclose(x, crossed[b], rtol=1e-3, atol=1e-3 * max(map(abs, x)))


@pytest.mark.parametrize("name", ["logistic regression", "factorization machine", "plain MLP", "DCN", "DLRM"])
def test_every_model_takes_empty_bags_and_learns_sparsely(name):
    batch, bags = random_batch()
    model = book.five_models(4, [6], [6])[name](SIZES, num_dense=4)
    book.nn.functional.binary_cross_entropy_with_logits(model(*batch[:3]), batch.labels).backward()
    for table, column in zip(model.tables, bags):
        assert table.weight.grad.is_sparse
        assert set(table.weight.grad.coalesce().indices()[0].tolist()) == {i for bag in column for i in bag}


def test_logistic_regression_orders_like_scikit_learns(data):
    train, test = slice(data.train.start, data.train.stop), slice(data.test.start, data.validation.stop)
    torch.manual_seed(0)
    model = book.LogisticRegression(data.table_sizes)
    book.train(model, data.batch, data.train, torch.optim.Adagrad(model.parameters(), lr=0.05), 256, num_epochs=4)
    ours = book.evaluate(model, data.batch(range(test.start, test.stop)))["auc"]
    one_hot = OneHotEncoder(handle_unknown="ignore").fit(data.sparse[train])
    columns = lambda rows: hstack([one_hot.transform(data.sparse[rows]), data.batch(rows).dense.numpy()]).tocsr()
    reference = linear_model.LogisticRegression(C=0.1, max_iter=300).fit(columns(train), data.labels[train])
    theirs = roc_auc_score(data.labels[test], reference.predict_proba(columns(test))[:, 1])
    assert abs(ours - theirs) < 0.005


def test_calibration_groups_against_scikit_learn_and_a_loop():
    rng = np.random.default_rng(0)
    probabilities = rng.random(1000)
    labels = rng.random(1000) < probabilities ** 2
    groups = book.calibration_groups(labels, probabilities)
    shares, means = calibration_curve(labels, probabilities, n_bins=10, strategy="quantile")
    assert np.allclose(groups["share"], shares) and np.allclose(groups["prediction"], means)
    ranked = sorted(zip(probabilities, labels))
    for k in range(10):
        part = ranked[100 * k:100 * (k + 1)]
        assert math.isclose(groups["prediction"][k], sum(p for p, _ in part) / 100)
        assert math.isclose(groups["share"][k], sum(y for _, y in part) / 100)


def test_the_curve_agrees_with_the_losses_and_with_evaluate(data):
    validation, results = data.batch(data.validation), []
    for learn in (book.train, functools.partial(book.learning_curve, validation=validation)):
        torch.manual_seed(0)
        model = book.DLRM(data.table_sizes, 4, [8], [8])
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
        results.append(learn(model, optimizer=optimizer, get_batch=data.batch, rows=data.train[:40_000], batch_size=1000))
    losses, curve = results
    last = book.evaluate(model, validation)
    assert list(curve["rows"]) == [5000 * k for k in range(1, 9)]
    assert np.allclose(curve["training log loss"], np.reshape(losses, (8, 5)).mean(1), atol=1e-5)
    assert curve["validation log loss"].iloc[-1] == last["log_loss"] and curve["validation accuracy"].iloc[-1] == last["accuracy"]


def test_compare_runs_every_pair_the_same_each_time(data):
    rates = pd.Series({("DCN", "SGD"): 0.01, ("DLRM", "Adagrad"): 0.02})
    models = {name: lambda new=new: new(data.table_sizes) for name, new in book.five_models(4, [8], [8]).items()}
    arguments = (models, rates, data.batch, data.train[:8_000], data.batch(data.validation[:500]), data.batch(data.test), 500, [0, 1])
    (scores, curves, groups), (again, _, _) = book.compare(*arguments), book.compare(*arguments)
    assert list(zip(scores["model"], scores["optimizer"], scores["seed"])) == [
        ("DCN", "SGD", 0), ("DCN", "SGD", 1), ("DLRM", "Adagrad", 0), ("DLRM", "Adagrad", 1)]
    assert scores.drop(columns="seconds").equals(again.drop(columns="seconds"))
    assert len(curves) == 4 * 8 and len(groups) == 4 * 10
    assert scores["log_loss"].nunique() == 4
    table = book.table_of(scores)
    assert list(table.index) == [("Adagrad", "DLRM"), ("SGD", "DCN")]
    assert math.isclose(table["auc"].iloc[0], scores.query("model == 'DLRM'")["auc"].mean())


def test_share_of_the_way_by_hand():
    scores = pd.DataFrame([dict(optimizer="Adagrad", seed=0, model="logistic regression", log_loss=0.5),
                           dict(optimizer="Adagrad", seed=0, model="DLRM", log_loss=0.4),
                           dict(optimizer="SGD", seed=0, model="DLRM", log_loss=0.3)])
    way = book.share_of_the_way(scores, ceiling=0.3)
    assert math.isclose(way.loc[0, "DLRM"], 0.5) and way.loc[0, "logistic regression"] == 0


def test_what_was_measured_is_complete():
    measured = notebook_definitions.ROOT / "figures/measured"
    rates, scores = pd.read_csv(measured / "learning_rates.csv"), pd.read_csv(measured / "comparison_scores.csv")
    assert len(rates) == 3 * 5 * 2 * 4 and (rates.groupby(["data", "layers", "model", "optimizer"])["learning_rate"].nunique() == 4).all()
    assert len(scores) == 2 * 5 * 2 * 3 and (scores.groupby(["data", "model", "optimizer"])["seed"].nunique() == 3).all()
    assert len(pd.read_csv(measured / "comparison_curves.csv")) == 8 * len(scores)
    assert len(pd.read_csv(measured / "comparison_groups.csv")) == 10 * len(scores)
