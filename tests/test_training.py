"""Training: the same twice, resumed to the bit, a rate that falls, and metrics as by hand."""

import gc
import math

import numpy as np
import pytest
import torch

ROWS, BATCH_SIZE = range(1_400), 100
STEPS = 14  # of an epoch


def new_model(notebook, toy, optimizer_class=torch.optim.Adagrad):
    torch.manual_seed(0)
    model = notebook.DLRM(toy.table_sizes, 4, [8], [8])
    return model, optimizer_class(model.parameters(), lr=0.02)


def trained(notebook, toy, model, optimizer, **more):
    """The losses of two epochs over some rows, or of a part of them."""
    return notebook.train(model, toy.batch, ROWS, optimizer, BATCH_SIZE, num_epochs=2, **more)


def weights(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.fixture(scope="module", params=[torch.optim.Adagrad, torch.optim.SGD])
def whole(request, notebook, toy):
    """A class of optimizer, and the losses and weights of a training without a break."""
    model, optimizer = new_model(notebook, toy, request.param)
    losses = trained(notebook, toy, model, optimizer)
    return request.param, losses, weights(model)


def test_two_runs_give_the_same_bits(notebook, toy, whole):
    optimizer_class, losses, expected = whole
    model, optimizer = new_model(notebook, toy, optimizer_class)
    assert trained(notebook, toy, model, optimizer) == losses and len(losses) == 2 * STEPS
    assert all(map(torch.equal, weights(model), expected))


@pytest.mark.parametrize(
    "stop", [1, STEPS - 1, STEPS, STEPS + 1, 20]
)  # about the first epoch's end
def test_a_resumed_run_equals_a_whole_one(notebook, toy, whole, tmp_path, stop):
    optimizer_class, losses, expected = whole
    part, optimizer = new_model(notebook, toy, optimizer_class)
    first = trained(notebook, toy, part, optimizer, stop=stop)
    notebook.save_checkpoint(tmp_path / "checkpoint.pt", part, optimizer, stop)
    resumed, optimizer = new_model(notebook, toy, optimizer_class)
    start = notebook.load_checkpoint(tmp_path / "checkpoint.pt", resumed, optimizer)["step"]
    second = trained(notebook, toy, resumed, optimizer, start=start)
    assert first + second == losses and all(map(torch.equal, expected, weights(resumed)))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow  # looks through all that Python holds, ten times
def test_no_tensor_of_a_step_outlives_it(notebook, toy):
    """Small tensors that are kept split up the memory, which then grows with every step."""
    counts = []

    def count_tensors(step, *_):
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))

    model, optimizer = new_model(notebook, toy)
    trained(notebook, toy, model, optimizer, after_step=count_tensors, stop=10)
    assert counts[2:] == counts[2:3] * 8


def test_each_epoch_sees_every_row_once_in_a_new_order(notebook, toy):
    seen = []

    def get_batch(rows):
        seen.append(rows)
        return toy.batch(rows)

    model, optimizer = new_model(notebook, toy)
    notebook.train(model, get_batch, ROWS, optimizer, 500, num_epochs=2)
    half = len(seen) // 2
    first, second = np.concatenate(seen[:half]), np.concatenate(seen[half:])
    assert sorted(first) == sorted(second) == list(ROWS) and not np.array_equal(first, second)


def test_fit_sees_every_row_once_an_epoch_in_a_new_order(notebook, toy):
    seen = []

    def get_batch(places):
        seen.append(places)
        return toy.batch(places.numpy())

    model, optimizer = new_model(notebook, toy)
    losses = notebook.fit(model, optimizer, get_batch, 1_000, batch_size=300, epochs=2)
    assert [len(places) for places in seen] == 2 * [300, 300, 300, 100] and len(losses) == 8
    first, second = torch.cat(seen[:4]).tolist(), torch.cat(seen[4:]).tolist()
    assert sorted(first) == sorted(second) == list(range(1_000))
    # Neither in the order of the rows, nor twice in the same: few keep their place by luck.
    for one, other in [(first, range(1_000)), (second, range(1_000)), (first, second)]:
        assert sum(a == b for a, b in zip(one, other)) < 20


def test_a_stop_beyond_the_end_is_the_end(notebook, toy):
    ends = []
    for stop in (None, 10_000):
        model, optimizer = new_model(notebook, toy)
        notebook.train(model, toy.batch, ROWS, optimizer, 500, stop=stop)
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


def rates_of(notebook, toy, **more):
    """The learning rate of each step, as the optimizer has it when the step is over."""
    model, optimizer = new_model(notebook, toy, torch.optim.SGD)
    rates = []

    def after_step(step, logits, labels):
        rates.append(optimizer.param_groups[0]["lr"])

    trained(notebook, toy, model, optimizer, after_step=after_step, **more)
    return rates


def test_the_rate_falls_to_zero_over_the_last_fifth(notebook, toy):
    rates, total = rates_of(notebook, toy), 2 * STEPS
    kept = math.ceil(0.8 * total)  # steps before the fall begins, and the one at which it does
    assert rates[:kept] == [0.02] * kept
    assert np.allclose(rates[kept:], [0.1 * (1 - step / total) for step in range(kept, total)])
    assert np.allclose(np.diff(rates[kept:]), -0.1 / total)  # a straight line, the same each step
    assert 0 < rates[-1] < 0.2 * 0.02


def test_a_resumed_run_goes_on_with_the_rate_of_its_step(notebook, toy):
    rates = rates_of(notebook, toy)
    assert rates_of(notebook, toy, start=25) == rates[25:]
    assert rates_of(notebook, toy, stop=25) == rates[:25]


def test_score_by_hand(notebook):
    labels, probabilities = [1, 0, 1, 0], [0.9, 0.8, 0.6, 0.1]
    result = notebook.score(labels, probabilities)
    assert result["auc"] == 3 / 4 and result["accuracy"] == 3 / 4 and result["base_rate"] == 0.5
    loss = -(math.log(0.9) + math.log(0.2) + math.log(0.6) + math.log(0.9)) / 4
    assert math.isclose(result["log_loss"], loss)


def test_entropy_is_the_log_loss_of_the_base_rate(notebook):
    labels = np.array([1, 0, 0, 0, 1])
    always = notebook.score(labels, np.full(5, 0.4))
    assert math.isclose(notebook.entropy_of(0.4), always["log_loss"])


def test_training_lowers_the_loss_on_new_rows(notebook, toy):
    model, optimizer = new_model(notebook, toy)
    before = notebook.evaluate(model, toy.batch(toy.test))
    notebook.train(model, toy.batch, toy.train[:20_000], optimizer, 64)
    after = notebook.evaluate(model, toy.batch(toy.test))
    assert after["log_loss"] < before["log_loss"] - 0.05 and after["auc"] > 0.6
