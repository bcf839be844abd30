"""Does every input count? Section 8's model with four forms of its bottom MLP, ten seeds each.

A seed gives a world, its 50,000 impressions and a model, as in the notebook. Of the trained model:
its log loss on 10,000 fresh impressions, outputs and hidden units of the bottom MLP that say the
same of all of them, how far the mean prediction moves with films watched and trailers skipped, and
how much the log loss rises if one input is shuffled. Writes figures/measured/live_inputs.csv. A
number as argument gives another count of seeds. Some 3 minutes.
"""

import contextlib
import io
import json
import sys

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import cross_val_predict

from shared import ROOT, in_parallel, notebook, save

INPUTS = ["watched", "skipped", "viewer", "film", "hour"]  # two dense numbers, three tables
WORLD = ("section-8-02", "section-8-04")  # the cells that make it
FORMS = ["linear", "ReLU", "ReLU, the paper's initial weights", "ReLU, its bias starts at 1"]


# ---- What other programs and tests use -------------------------------------------------------


def film_world(seed):
    """The names that section 8's cells define: its world of this seed, `impressions`, `fresh`."""
    cells = json.loads((ROOT / "DLRM.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = {cell["id"]: "".join(cell["source"]) for cell in cells}
    names = vars(notebook) | {"seed": seed}
    names["liked_vector"] = notebook.genre_table[notebook.liked_ids].sum(0)
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in WORLD:
            exec(sources[cell], names)
    return names


def losses(model, batch):
    """The log loss of each row, an array (B,)."""
    predictions = notebook.predict(model, batch).astype(float).clip(1e-7, 1 - 1e-7)
    return -np.log(np.where(batch.labels == 1, predictions, 1 - predictions))


def rises(model, batch, seed=0):
    """How much the mean log loss rises when an input is shuffled: dense numbers, then tables.

    Returns an array (inputs, 2): the rise, and its standard error over the rows.
    """
    torch.manual_seed(seed)
    before = losses(model, batch)
    numbers = batch.dense.shape[1] + len(batch.indices)
    changes = [losses(model, batch.shuffled(place)) - before for place in range(numbers)]
    return np.array([(change.mean(), change.std() / len(change) ** 0.5) for change in changes])


def move(model, batch, place, low, high):
    """How far the mean prediction moves when a dense number goes from low to high in all rows."""
    means = []
    for value in (low, high):
        dense = batch.dense.clone()
        dense[:, place] = value
        means.append(notebook.predict(model, batch._replace(dense=dense)).mean())
    return float(means[1] - means[0])


def silent(outputs):
    """How many columns of the outputs (B, units) say the same of every row."""
    return int((outputs == outputs[0]).all(0).sum())


# ---- The measurement -------------------------------------------------------------------------


def new_model(form, seed):
    """Section 8's model with one of FORMS."""
    model = notebook.new_film_model(seed, relu_after_bottom=form != "linear")
    linear_layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    if "paper" in form:  # as Facebook's code draws them
        for layer in linear_layers:
            deviation = (2 / (layer.in_features + layer.out_features)) ** 0.5
            torch.nn.init.normal_(layer.weight, 0, deviation)
            torch.nn.init.normal_(layer.bias, 0, layer.out_features**-0.5)
    if "bias" in form:
        torch.nn.init.ones_(model.bottom[-2].bias)
    return model


def fit_of_the_plane(model, world):
    """R² of the films' vectors, each placed by a map that was fitted to the other eleven."""
    learned = model.tables[1].weight.detach().numpy()[1:]
    places = world["hidden_films"][1:]
    return r2_score(places, cross_val_predict(LinearRegression(), learned, places, cv=12))


def measured(form, seed):
    """A row of the table."""
    world = film_world(seed)
    impressions, fresh = world["impressions"], world["fresh"]
    rows = len(impressions.dense)
    torch.manual_seed(seed)
    additive = notebook.LogisticRegression([301, 13, 3], num_dense=2)
    notebook.fit(additive, notebook.adagrad(additive), impressions.take, rows)
    model = new_model(form, seed)
    notebook.fit(model, notebook.adagrad(model), impressions.take, rows)
    score, best = notebook.evaluate(model, fresh), notebook.score(*world_truth(world))
    row = {"data": "section 8's world", "form": form, "seed": seed}
    row |= {"log_loss": score["log_loss"], "auc": score["auc"]}
    row |= {"truth_log_loss": best["log_loss"], "truth_auc": best["auc"]}
    row["logistic_log_loss"] = notebook.evaluate(additive, fresh)["log_loss"]
    row["r2"] = fit_of_the_plane(model, world)
    with torch.no_grad():
        row["dead_outputs"] = silent(model.bottom(fresh.dense))
        row["dead_hidden"] = silent(model.bottom[:2](fresh.dense))
    row["watched_0_to_10"] = move(model, fresh, 0, 0, np.log1p(10))
    row["skipped_0_to_5"] = move(model, fresh, 1, 0, np.log1p(5))
    for name, (rise, error) in zip(INPUTS, rises(model, fresh, seed), strict=True):
        row |= {f"{name}_rise": rise, f"{name}_error": error}
    return row


def world_truth(world):
    """Labels and true probabilities of the fresh impressions."""
    return world["fresh"].labels, world["fresh_chance"]


def main(seeds=10):
    jobs = [(form, seed) for form in FORMS for seed in range(seeds)]
    table = pd.DataFrame(in_parallel(measured, jobs)).round(5)
    save(table, "live_inputs", seeds == 10)
    for form, rows in table.groupby("form", sort=False):
        errors = [(rows[f"{name}_rise"] / rows[f"{name}_error"]).fillna(0) for name in INPUTS]
        loss = rows["log_loss"]
        print(
            f"{form:34} log loss {loss.mean():.4f}, worst {loss.max():.4f}; "
            f"dead outputs {rows['dead_outputs'].tolist()}, hidden {rows['dead_hidden'].tolist()}; "
            f"watched at least {rows['watched_0_to_10'].min():+.3f}, "
            f"skipped at most {rows['skipped_0_to_5'].max():+.3f}; "
            f"smallest rise {np.min(errors):.1f} standard errors"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
