"""Live pictures: a notebook's numbers, and the script of live.html that moves them on the page."""

import json
from pathlib import Path

import torch
from IPython.display import HTML

PAGE = Path(__file__).with_suffix(".html")


def live(picture, **numbers):
    """The picture "films" or "people" of live.html, for a cell's output.

    numbers: what the picture's function in live.html names; tensors, arrays, lists and texts.
    """
    text = json.dumps(numbers, default=_rounded).replace("<", "\\u003c")  # no tag ends the script
    page = PAGE.read_text(encoding="utf-8")
    return HTML(page.replace("PICTURE", picture).replace("NUMBERS", text))


def _rounded(numbers):
    """Six digits, which a picture cannot show to be wrong, take half the space."""
    return torch.as_tensor(numbers).double().round(decimals=6).tolist()
