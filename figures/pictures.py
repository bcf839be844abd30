"""What cells show besides plots: pictures that move on the page, and graphs of boxes and arrows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from IPython.display import HTML

LIVE = Path(__file__).with_name("live.html")


def live(picture, **numbers):
    """The picture "films" or "people" of live.html, for a cell's output.

    numbers: what the picture's function in live.html names; tensors, arrays, lists and texts.
    """
    text = json.dumps(numbers, default=_rounded).replace("<", "\\u003c")  # no tag ends the script
    page = LIVE.read_text(encoding="utf-8")
    return HTML(page.replace("PICTURE", picture).replace("NUMBERS", text))


def _rounded(numbers):
    """Six digits, which a picture cannot show to be wrong, take half the space."""
    return torch.as_tensor(numbers).double().round(decimals=6).tolist()


def draw_graph(graph, path):
    """Draw a Graphviz graph, torchviz's say, as SVG with the renderer that pip installed.

    torchviz names boxes by places in memory; renumbered, the same graph gives the same file.
    """
    numbers = {}
    source = graph.source.replace("=monospace", '="Courier New"')  # the renderer knows its width
    source = re.sub(
        r"\b\d{9,}\b", lambda place: str(numbers.setdefault(place[0], len(numbers))), source
    )
    command = [Path(sys.executable).with_name("graphviz-pure"), "-Tsvg"]
    svg = subprocess.check_output(command, input=source, text=True)
    svg = svg.replace('"Courier New"', '"Courier New,monospace"')  # where a browser lacks it
    Path(path).write_text(svg, encoding="utf-8")
