"""Training: the same twice, resumed to the bit, and metrics as by hand."""
import math

import numpy as np
import pytest
import torch

import notebook_definitions
from dlrm_utils import preprocess_criteo, write_toy_criteo

book = notebook_definitions.load()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    raw = tmp_path_factory.mktemp("training") / "toy.txt"
    write_toy_criteo(raw, 4_000)
    return preprocess_criteo(raw, raw.with_suffix(".npz"), progress=False)


def new_model(data, optimizer_class=torch.optim.Adagrad):
    torch.manual_seed(0)
    model = book.DLRM(data.table_sizes, 4, [8], [8])
    return model, optimizer_class(model.parameters(), lr=0.02)


def weights(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


def test_two_runs_give_the_same_bits(data):
    runs = []
    for _ in range(2):
        model, optimizer = new_model(data)
        losses = book.train(model, data.batch, data.train, optimizer, 128, num_epochs=2)
        runs.append((losses, weights(model)))
    assert runs[0][0] == runs[1][0] and all(map(torch.equal, runs[0][1], runs[1][1]))
    assert len(runs[0][0]) == 2 * math.ceil(len(data.train) / 128)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adagrad, torch.optim.SGD])
@pytest.mark.parametrize("stop", [1, 26, 27, 28, 40])                            # before, at and after the end of epoch 1
def test_a_resumed_run_equals_a_whole_one(data, tmp_path, stop, optimizer_class):
    batch_size, steps = 128, 2 * math.ceil(len(data.train) / 128)
    assert steps == 54
    whole, optimizer = new_model(data, optimizer_class)
    losses = book.train(whole, data.batch, data.train, optimizer, batch_size, num_epochs=2)
    part, optimizer = new_model(data, optimizer_class)
    first = book.train(part, data.batch, data.train, optimizer, batch_size, num_epochs=2, stop=stop)
    book.save_checkpoint(tmp_path / "checkpoint.pt", part, optimizer, stop)
    resumed, optimizer = new_model(data, optimizer_class)
    start = book.load_checkpoint(tmp_path / "checkpoint.pt", resumed, optimizer)["step"]
    second = book.train(resumed, data.batch, data.train, optimizer, batch_size, num_epochs=2, start=start)
    assert first + second == losses and all(map(torch.equal, weights(whole), weights(resumed)))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_each_epoch_sees_every_row_once_in_a_new_order(data):
    seen = []

    def get_batch(rows):
        seen.append(rows)
        return data.batch(rows)

    model, optimizer = new_model(data)
    book.train(model, get_batch, data.train, optimizer, 500, num_epochs=2)
    half = len(seen) // 2
    first, second = np.concatenate(seen[:half]), np.concatenate(seen[half:])
    assert sorted(first) == sorted(second) == list(data.train) and not np.array_equal(first, second)


def test_a_stop_beyond_the_end_is_the_end(data):
    ends = []
    for stop in (None, 10_000):
        model, optimizer = new_model(data)
        book.train(model, data.batch, data.train, optimizer, 1_000, stop=stop)
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


def test_score_by_hand():
    labels, probabilities = [1, 0, 1, 0], [0.9, 0.8, 0.6, 0.1]
    result = book.score(labels, probabilities)
    assert result["auc"] == 3 / 4 and result["accuracy"] == 3 / 4 and result["base_rate"] == 0.5
    assert math.isclose(result["log_loss"], -(math.log(0.9) + math.log(0.2) + math.log(0.6) + math.log(0.9)) / 4)
    assert math.isclose(result["mean_prediction"], 0.6)


def test_training_lowers_the_loss_on_new_rows(tmp_path):
    write_toy_criteo(tmp_path / "toy.txt", 20_000)
    data = preprocess_criteo(tmp_path / "toy.txt", tmp_path / "toy.npz", min_count=5, progress=False)
    model, optimizer = new_model(data)
    before = book.evaluate(model, data.batch(data.test))
    book.train(model, data.batch, data.train, optimizer, 64, num_epochs=2)
    after = book.evaluate(model, data.batch(data.test))
    assert after["log_loss"] < before["log_loss"] - 0.05 and after["auc"] > 0.6
