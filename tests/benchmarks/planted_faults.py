"""Twelve faults planted in section 8's model or its data: which check catches each?

Each fault is planted in three worlds, the sound model and the dead one of section 9 run beside
them. Two checks as they are often done (overfit the first 64 rows; shuffle the training labels) and
those of section 9: the place between logistic regression and the best possible score, every input
shuffled, labels shuffled before anything else happens, 64 rows of eight viewers learned by heart;
and whether every tensor of weights moved. Writes figures/measured/planted_faults.csv. A number as
argument gives another count of worlds. Some 5 minutes.
"""

import itertools
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from live_inputs import film_world, losses, rises
from shared import in_parallel, notebook, save


def unchanged(thing):
    return thing


class Fault(NamedTuple):
    """What a fault does to a batch, to a new model, and to a step of training."""

    batch: Callable = unchanged
    model: Callable = unchanged
    step: Callable = notebook.training_step
    on_training_rows: bool = False  # is the score taken on rows of the training?


# ---- The faults ------------------------------------------------------------------------------


def labels_a_row_late(batch):
    return batch._replace(labels=batch.labels.roll(1))


def films_a_row_late(batch):
    viewer, film, hour = batch.indices
    return batch._replace(indices=[viewer, film.roll(1), hour])


def label_as_number(batch):
    dense = batch.dense.clone()
    dense[:, 0] = batch.labels
    return batch._replace(dense=dense)


def label_as_hour(batch):
    return batch._replace(indices=[*batch.indices[:2], batch.labels.long() + 1])


def only_the_diagonal(model):
    model.kept = torch.tensor([0, 5, 10, 15, 0, 5])  # of the 4 by 4 products, for the six pairs
    return model


def without_pairs(model):
    def combine(self, dense_vector, looked_up):
        zeros = dense_vector.new_zeros(len(dense_vector), len(self.kept))
        return self.top(torch.cat([dense_vector, zeros], 1)).squeeze(1)

    model.combine = types.MethodType(combine, model)
    return model


def frozen(table):
    def change(model):
        model.tables[table].weight.requires_grad_(False)
        return model

    return change


def stepping(reduction="mean", zero=True):
    """A step of training with another reduction, or that never forgets the gradients."""

    def step(model, optimizer, batch):
        logits = model(batch.dense, batch.indices, batch.offsets)
        loss = binary_cross_entropy_with_logits(logits, batch.labels, reduction=reduction)
        if zero:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return logits.detach(), loss.detach() / (len(batch.labels) if reduction == "sum" else 1)

    return step


FAULTS = {
    "none": Fault(),
    "gradients never zeroed": Fault(step=stepping(zero=False)),
    "sum for mean of the loss": Fault(step=stepping("sum")),
    "labels shifted by a row": Fault(labels_a_row_late),
    "film ids shifted by a row": Fault(films_a_row_late),
    "label leaked into a number": Fault(label_as_number),
    "label leaked into the hour": Fault(label_as_hour),
    "scored on training rows": Fault(on_training_rows=True),
    "the diagonal, and no pair": Fault(model=only_the_diagonal),
    "no pairs": Fault(model=without_pairs),
    "viewer table frozen": Fault(model=frozen(0)),
    "film table frozen": Fault(model=frozen(1)),
    "hour table frozen": Fault(model=frozen(2)),
}
DEAD = "a dead bottom MLP"  # no fault of a line: the published form, with a seed that dies


# ---- The checks ------------------------------------------------------------------------------


def trained(model, step, batch, epochs=1):
    """The model, trained as `fit` does but by any step; and the last loss."""
    optimizer = notebook.adagrad(model)
    for _ in range(epochs):
        for places in torch.randperm(len(batch.dense)).split(64):
            _, loss = step(model, optimizer, batch.take(places))
    return model, loss.item()


def with_shuffled_labels(batch):
    return batch._replace(labels=batch.labels[torch.randperm(len(batch.labels))])


def tests_of(world, fault, train):
    """The rows to score, and how far from one half luck carries the AUC of labels at random."""
    test = train.take(range(10_000)) if fault.on_training_rows else world["fresh"]
    clicks = test.labels.sum().item()
    others = len(test.labels) - clicks
    return test, ((clicks + others + 1) / (12 * clicks * others)) ** 0.5


def measured(name, seed):
    """What each check says of one fault in one world."""
    world = film_world(seed)
    fault, form = FAULTS.get(name, Fault()), {}
    if name == DEAD:
        form = {"seed": dead_seed(world), "relu_after_bottom": True}
    changed = lambda: fault.model(notebook.new_film_model(**{"seed": seed} | form))  # noqa: E731
    raw = world["impressions"]
    raw_test, luck = tests_of(world, fault, raw)
    train, test = fault.batch(raw), fault.batch(raw_test)

    model, _ = trained(changed(), fault.step, train)
    additive = notebook.LogisticRegression([301, 13, 3], num_dense=2)
    trained(additive, fault.step, train)
    loss, floor = losses(model, test).mean(), losses(additive, test).mean()
    best = notebook.score(world["fresh"].labels, world["fresh_chance"])["log_loss"]
    row = {"data": "section 8's world", "fault": name, "seed": seed, "log_loss": loss}
    row |= {"auc": notebook.evaluate(model, test)["auc"], "way": (floor - loss) / (floor - best)}
    changes = rises(model, test, seed)
    row["least_rise"] = (changes[:, 0] / changes[:, 1].clip(1e-9)).min()
    before = changed().state_dict()
    row["unmoved"] = sum(torch.equal(w, before[k]) for k, w in model.state_dict().items())

    few = torch.nonzero(raw.indices[0] <= 8)[:64, 0]
    _, row["by_heart"] = trained(changed(), fault.step, train.take(few), epochs=200)
    _, row["first_by_heart"] = trained(changed(), fault.step, train.take(range(64)), epochs=200)

    torch.manual_seed(100 + seed)
    nothing = with_shuffled_labels(raw)
    nothing_test = with_shuffled_labels(raw_test)
    if fault.on_training_rows:
        nothing_test = nothing.take(range(10_000))
    control, _ = trained(changed(), fault.step, fault.batch(nothing))
    row["control"] = notebook.evaluate(control, fault.batch(nothing_test))["auc"]
    control, _ = trained(changed(), fault.step, with_shuffled_labels(train))
    row["late_control"] = notebook.evaluate(control, test)["auc"]
    return row | {"luck": luck}


def dead_seed(world):
    """The first seed with which the published form, trained, gives 0 for every impression."""
    for seed in itertools.count():
        model = notebook.new_film_model(seed, relu_after_bottom=True)
        trained(model, notebook.training_step, world["impressions"])
        if not model.bottom(world["fresh"].dense).any():
            return seed


def verdicts(table):
    """By check, in which rows of the table it sees a fault: before, and as in section 9."""
    far = (table["control"] - 0.5).abs() > 3 * table["luck"]
    return pd.DataFrame(
        {
            "first 64 by heart": table["first_by_heart"] > 0.1,
            "labels shuffled late": (table["late_control"] - 0.5).abs() > 0.05,
            "place": ~table["way"].between(0.8, 1.1),
            "every input": ~(table["least_rise"] > 2),
            "labels shuffled first": far,
            "64 of 8 viewers by heart": table["by_heart"] > 0.1,
            "every tensor moves": table["unmoved"] > 0,
        }
    )


def main(worlds=3):
    jobs = [(name, seed) for name in [*FAULTS, DEAD] for seed in range(worlds)]
    table = pd.DataFrame(in_parallel(measured, jobs)).round(5)
    save(table, "planted_faults", worlds == 3)
    print(f"caught, of {worlds} worlds")
    print(verdicts(table).groupby(table["fault"], sort=False).sum().to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
