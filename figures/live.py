"""The pictures that move on the page, and what the notebook gives its three of them."""

import json
from pathlib import Path

import numpy as np
import torch
from IPython.display import HTML
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import cross_val_predict

from dlrm_utils import to_bags

FOLDER, INSERTS = Path(__file__).parent, ("live.css", "training.js", "world.js")
KINDS = ["other", "comedy", "horror", "both"]


def picture(name, **numbers):
    """The picture "films" or "people" of live.html, for a cell's output.

    numbers: what the picture's function in live.html names; tensors, arrays, lists and texts.
    """

    def rounded(x):  # six digits, which no picture can show to be wrong, take half the space
        return torch.as_tensor(x).double().round(decimals=6).tolist()

    texts = {file: (FOLDER / file).read_text("utf-8") for file in INSERTS}
    texts["NUMBERS"] = json.dumps(numbers, default=rounded).replace("<", "\\u003c")
    page = (FOLDER / "live.html").read_text("utf-8").replace("PICTURE", name)
    for place, text in texts.items():
        page = page.replace(f"INSERT {place}", text)
    return HTML(page)


def turned(learned, truth):
    """Learned points (n, 2), each placed by the linear map that fits all others to the truth."""
    return cross_val_predict(LinearRegression(), learned, truth, cv=len(truth))


def mira(model, genres, liked, films, hours):
    """Section 7: the typed model, and names of the rows of its three tables."""
    stages = [{"weights": model.state_dict()}]
    return picture(
        "films", stages=stages, who="liked", genres=genres, liked=liked, films=films, hours=hours,
        kinds=KINDS,
    )  # fmt: skip


def world(stages, losses, planes, hidden, films, hours, kinds):
    """Section 8: the models, log losses and turned planes by impressions seen, and the world.

    hidden: its vectors of viewers, films and hours. Its rule is written as the weights of a DLRM
    without hidden layers: half of watched, less half of skipped, twice the film's two products.
    """
    kept = [
        {"name": f"{seen:,} impressions", "seen": seen, "log_loss": losses[seen],
         "plane": planes[seen], "weights": stage.state_dict()}
        for seen, stage in stages.items()
    ]  # fmt: skip
    rule = {f"tables.{t}.weight": vectors for t, vectors in enumerate(hidden)}
    rule |= {"bottom.0.weight": torch.eye(2), "bottom.0.bias": [0, 0], "top.0.bias": [-1]}
    # dense, viewer . dense, film . dense, film . viewer, hour . dense, hour . viewer, hour . film
    rule |= {"top.0.weight": [[0.5, -0.5, 0, 0, 2, 0, 0, 2]]}
    names = {"films": films, "hours": hours, "kinds": ["other", *kinds]}
    return picture("films", stages=kept, truth=rule, who="viewer", **names)


def people(model, encoder, films, most=2_000):
    """Section 10: its model, and of the best-known films what their own bags hold."""
    films = films[:most]
    alone = encoder.transform(films.assign(liked=[[title] for title in films["title"]]))
    own, genres, bags = map(to_bags, alone.indices, alone.offsets)
    liked = [bag[0] for bag in bags]
    rows = zip(
        films["title"], liked, zip(own, genres), alone.dense.tolist(), np.log(films["likes"])
    )
    return picture("people", weights=model.state_dict(), films=list(rows))
