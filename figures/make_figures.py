"""Draw the teaching figures of DLRM.ipynb, as SVG files beside this program.

Every name and number comes from the notebook's own hand-typed example, so no figure can disagree
with the text. Lengths are in points, like the type sizes. Two runs write the same bytes.
"""

import ast
import json
import re
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import dlrm_utils  # noqa: E402

TEXT, SMALL = 11, 9  # the two type sizes
INK, FAINT = "#1a202c", "#cbd5e0"
# How much of its colour a filled box takes. The fills also differ in lightness, so that they can
# be told apart in black and white.
STRENGTH = {"other": 0.08, "dense": 0.22, "embedding": 0.55, "interaction": 0.60}
CRITEO_EXAMPLES = 45_840_617  # the labelled file, as section 10 counts it

# Text as paths looks the same without the font; a fixed salt makes the ids in a file the same in
# every run.
SVG = {"svg.fonttype": "path", "svg.hashsalt": "DLRM", "font.family": "DejaVu Sans"}


# ---- What the notebook says ----------------------------------------------------------------------


def code_cells():
    """The sources of the notebook's code cells, in order."""
    notebook = json.loads((HERE.parent / "DLRM.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def typed_colours():
    """The dictionary that the notebook assigns to COLOURS among its settings."""
    for cell in code_cells():
        for statement in ast.parse(cell).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "COLOURS":
                return ast.literal_eval(statement.value)
    raise LookupError("DLRM.ipynb assigns nothing to COLOURS, the palette of every figure")


def dense_meanings():
    """What the dense numbers mean: the comment where the notebook types them."""
    for cell in code_cells():
        found = re.search(r"^dense_row = .*# dense: (.*)", cell, re.MULTILINE)
        if found:
            return found[1].split(", ")
    raise LookupError("DLRM.ipynb has no comment '# dense: ..., ...' beside dense_row")


COLOURS = typed_colours()
NAMES = ["dense", "liked", "film", "hour"]  # of the four vectors, as in section 5


def typed_model(book):
    """The notebook's class with the weights that its Part I types."""
    tables = [book.genre_table, book.film_table, book.hour_table]
    bottom = [book.bottom_w1, book.bottom_b1, book.bottom_w2, book.bottom_b2]
    top = [book.top_w1, book.top_b1, book.top_w2, book.top_b2]
    hidden = [[len(bottom[1])], [len(top[1])]]
    model = book.DLRM([len(table) for table in tables], tables[0].shape[1], *hidden, num_dense=2)
    with torch.no_grad():
        for parameter, numbers in zip(model.parameters(), tables + bottom + top, strict=True):
            parameter.copy_(numbers)
    return model


def worked_example(book):
    """What the notebook types, and all that its own model makes of it, up to the probability."""
    model = typed_model(book)
    logs = book.her_dense[0]
    logit = model(book.her_dense, book.her_indices, book.her_offsets)
    click = torch.tensor([book.clicked])
    torch.nn.functional.binary_cross_entropy_with_logits(logit, click).backward()
    with torch.no_grad():
        hidden_sums = model.bottom[0](logs)  # (3,), before their ReLU
        bags = model.tables(book.her_indices, book.her_offsets)[0]  # (3, 2)
        vectors = torch.cat([model.bottom(logs)[None], bags])  # (4, 2)
    probability = torch.sigmoid(logit).item()
    computed = {
        "model": model,
        "fields": [ids.tolist() for ids in book.her_indices],
        "logs": logs,
        "hidden_sums": hidden_sums,
        "vectors": vectors,
        "products": vectors @ vectors.T,  # (4, 4)
        "kept": [divmod(place, len(vectors)) for place in model.kept.tolist()],  # (row, column)
        "logit": logit.item(),
        "probability": probability,
        "loss_click": -np.log(probability),
        "loss_no_click": -np.log(1 - probability),
        "genre_gradient": model.tables[0].weight.grad.to_dense(),  # (4, 2)
    }
    return SimpleNamespace(**(vars(book) | computed))


# ---- Numbers as text -----------------------------------------------------------------------------


def signed(text):
    """The text with a true minus sign, and without one before a zero."""
    return re.sub(r"^-0(\.0*)?$", r"0\1", text).replace("-", "−")


def number(value):
    """A number as it was typed: 3 for 3.0."""
    return signed(f"{value:g}")


def thousandths(value):
    """At most three decimals: 1.386, 0.5, 0."""
    return signed(f"{value:.3f}".rstrip("0").rstrip("."))


def hundredths(value):
    """Two decimals, as in the boxes of the architecture."""
    return signed(f"{value:.2f}")


def vector(values, form=hundredths):
    return "[" + ", ".join(map(form, values)) + "]"


def several(word, bag, between=", "):
    """'id 3' or 'ids 1, 2'."""
    return f"{word}{'s' * (len(bag) != 1)} {between.join(map(str, bag))}"


def widths(mlp):
    """The widths of an MLP's layers; every other layer is a ReLU, which changes no width."""
    return " → ".join(map(str, [mlp[0].in_features, *(layer.out_features for layer in mlp[::2])]))


# ---- Drawing -------------------------------------------------------------------------------------


def canvas(width, height, title):
    """An empty white drawing under its title, in points.

    Every width is that of the notebook's <img> over 1.55, so type is equally large in all figures.
    """
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    ax = figure.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    label(ax, 8, height - 13, title, TEXT, ha="left", weight="bold")
    return ax


def panel(ax, left, bottom, width, height, **settings):
    """A plot within a drawing, its place given in points."""
    plot = ax.inset_axes([left, bottom, width, height], transform=ax.transData)
    plot.set(**settings)
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color(COLOURS["other"])
    plot.tick_params(color=COLOURS["other"], labelcolor=INK, labelsize=SMALL)
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
    return plot


def label(ax, x, y, text, size=SMALL, above=False, **options):
    """Lines of text centred on (x, y), or, if `above`, with the last line at y."""
    lines = str(text).split("\n")
    top = y + 1.2 * size * (len(lines) - 1) * (1 if above else 0.5)
    options = {"size": size, "color": INK, "ha": "center", **options}
    for i, line in enumerate(lines):
        # Set on baselines: matplotlib's centring lifts a word with a "p" above its neighbours.
        ax.text(x, top - 1.2 * size * i - 0.36 * size, line, **options)


def beside(plot, point, text, shift=(0, 0), **options):
    """Text in a plot, its place given by a point of the plot and a shift in points."""
    options = {"size": SMALL, "color": INK, "ha": "center", "va": "center", **options}
    plot.annotate(text, point, shift, textcoords="offset points", **options)


def tint(kind, strength):
    """A colour thinned with white."""
    return [1 - strength * (1 - part) for part in to_rgb(COLOURS[kind])]


def frame(ax, x, y, width, height, text, note, shape, **style):
    """A box centred on (x, y), with a small note below its text."""
    corner = (x - width / 2, y - height / 2)
    # Thick outlines lie over thin ones.
    style = {"zorder": style["linewidth"], **style}
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, **style))
    label(ax, x, y + (7 if note else 0), text, TEXT)
    label(ax, x, y - 8, note)


def box(ax, x, y, width, height, text, kind, note="", strength=None, line=None):
    """A value: filled, with corners."""
    line = line or (0.6 if kind == "other" else 1.0)
    fill = tint(kind, STRENGTH[kind] if strength is None else strength)
    style = {"facecolor": fill, "edgecolor": COLOURS[kind], "linewidth": line}
    frame(ax, x, y, width, height, text, note, "square,pad=0", **style)


def step(ax, x, y, width, height, text, kind, note=""):
    """A step of computing: white and round."""
    style = {"facecolor": "white", "edgecolor": COLOURS[kind], "linewidth": 1.6}
    frame(ax, x, y, width, height, text, note, "round,pad=0,rounding_size=7", **style)


def cells(ax, left, y, width, height, texts, kinds, notes=None, strength=None):
    """Values side by side, the first one's left edge at `left`."""
    notes = notes or [""] * len(kinds)
    for i, (text, kind, note) in enumerate(zip(texts, kinds, notes, strict=True)):
        box(ax, left + (i + 0.5) * width, y, width, height, text, kind, note, strength)


def dashed_box(ax, x, y, width, height, text, size=SMALL):
    """The outline of something empty."""
    corner = (x - width / 2, y - height / 2)
    style = {"fill": False, "edgecolor": COLOURS["other"], "linestyle": (0, (3, 3))}
    ax.add_patch(Rectangle(corner, width, height, **style))
    label(ax, x, y, text, size)


def arrow(ax, start, end, colour=COLOURS["other"], path="arc3", width=1.2):
    head = 0.2 + 0.02 * width
    props = {
        "arrowstyle": f"-|>,head_width={head},head_length={2 * head}",
        "connectionstyle": path,
        "color": colour,
        "linewidth": width,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 10 + 2 * width,
    }
    ax.annotate("", end, start, arrowprops=props)


def dashed_arrow(ax, start, end, colour):
    """An arrow with a dashed shaft and a whole head."""
    start, end = np.array(start), np.array(end)
    ax.plot(*zip(start, end - 0.03 * (end - start), strict=True), color=colour, dashes=(3, 2))
    arrow(ax, start + 0.95 * (end - start), end, colour)


def bracket(ax, left, right, y):
    """A horizontal bracket, open below."""
    ys = [y - 4, y, y, y - 4]
    ax.plot([left, left, right, right], ys, color=COLOURS["other"], linewidth=1)


# ---- Section 1: one impression, and the whole model ----------------------------------------------


def architecture(book):
    """The whole model, from the impression at the bottom to the probability at the top."""
    ax, top = canvas(464, 510, "Numbers and names in, one probability out"), 232
    columns = [59.5, 174.5, 289.5, 404.5]
    towers(ax, book, columns, 103)
    for x in columns[1:]:
        arrow(ax, (x, 204), (x, 228))
    arrow(ax, (columns[0], 204), (columns[0], 290))  # past the dot products ...
    arrow(ax, (columns[0], 246), (108, 246))  # ... and into them
    counts = f"{len(book.vectors)} vectors → {len(book.kept)} products"
    step(ax, 282, 246, 348, 36, "dot products of all pairs", "interaction", counts)
    arrow(ax, (282, 264), (282, 290))
    dense = map(hundredths, book.vectors[0])
    cells(ax, 8, 309, 46, 38, dense, ["dense"] * 2, ["dense[0]", "dense[1]"])
    pairs = [hundredths(book.products[pair]) for pair in book.kept]
    notes = [f"{NAMES[j]}·{NAMES[k]}" for j, k in book.kept]
    cells(ax, 108, 309, 58, 38, pairs, ["interaction"] * 6, notes)
    bracket(ax, 8, 456, 336)
    label(ax, top + 8, 348, f"concatenated: {book.model.top[0].in_features} numbers", ha="left")
    step(ax, top, 378, 124, 36, "top MLP", "other", widths(book.model.top))
    box(ax, top, 424, 124, 24, f"logit {book.logit:.3f}", "other")
    label(ax, top + 8, 446, "sigmoid", ha="left")
    box(ax, top, 468, 124, 24, f"probability {book.probability:.2f}", "other", line=1.6)
    for low, high in [(336, 360), (396, 412), (436, 456)]:
        arrow(ax, (top, low), (top, high))
    return ax


def towers(ax, book, columns, width):
    """The architecture's lower half: numbers and names become four vectors, one a column."""
    inputs = [vector(book.dense_row, number), ", ".join(book.liked), book.film, book.hour]
    for x, name, value, made in zip(columns, NAMES, inputs, book.vectors, strict=True):
        kind = "dense" if name == "dense" else "embedding"
        label(ax, x, 11, "dense numbers" if name == "dense" else f"sparse: {name}")
        box(ax, x, 32, width, 24, value, kind)
        box(ax, x, 192, width, 24, vector(made), kind)
        for low, high in [(44, 64), (100, 120), (156, 180)]:
            arrow(ax, (x, low), (x, high))
    step(ax, columns[0], 82, width, 36, "log(1 + x)", "dense", vector(book.logs))
    step(ax, columns[0], 138, width, 36, "bottom MLP", "dense", widths(book.model.bottom))
    tables = zip(columns[1:], book.fields, ["genre", *NAMES[2:]], book.model.tables, strict=True)
    for x, bag, name, table in tables:
        box(ax, x, 82, width, 36, several("id", bag), "embedding", f"bag of {len(bag)}")
        shape = f"embedding, {table.num_embeddings} × {table.embedding_dim}"
        step(ax, x, 138, width, 36, f"{name} table", "embedding", shape)
        label(ax, x + 8, 167, several("row", bag, " + "), ha="left")


def row(book):
    """One impression: dense numbers, sparse names with their ids, and the label."""
    ax = canvas(400, 152, "An impression is a few numbers and a few names")
    y = 42
    heads = [*(textwrap.fill(meaning, 9) for meaning in dense_meanings()), *NAMES[1:], "click"]
    film = book.film.replace(" ", "\n")
    sparse = ["\n".join(book.liked), film, book.hour]
    texts = [*map(number, book.dense_row), *sparse, number(book.clicked)]
    notes = ["", "", *(several("id", bag) for bag in book.fields), ""]
    places = [(37, 54), (91, 54), (167, 62), (229, 62), (291, 62), (365, 50)]
    kinds = ["dense"] * 2 + ["embedding"] * 3 + ["other"]
    for (x, width), kind, head, text, note in zip(places, kinds, heads, texts, notes, strict=True):
        label(ax, x, y + 27, head, above=True)
        box(ax, x, y, width, 36, text, kind)
        label(ax, x, y - 28, note)
    for left, right, half in [(10, 118, "dense"), (136, 322, "sparse"), (340, 390, "label")]:
        bracket(ax, left, right, y + 60)
        label(ax, (left + right) / 2, y + 70, half, TEXT, weight="bold")
    return ax


# ---- Section 2: vectors --------------------------------------------------------------------------


def funny_scary_plane(title, caption_height):
    """A drawing and in it the axes of both pictures of the plane, 125 points a unit both ways."""
    ax = canvas(297, 304 + caption_height, title)
    ticks = [-0.5, 0, 0.5, 1]
    settings = {"xlim": (-0.75, 1.3), "ylim": (-0.7, 1.2), "xticks": ticks, "yticks": ticks}
    plot = panel(ax, 36, caption_height + 26, 256.25, 237.5, **settings)
    label(ax, 164, caption_height + 3, "funny", TEXT)
    label(ax, 8, caption_height + 271, "scary", TEXT, ha="left")
    for line in (plot.axhline, plot.axvline):
        line(0, color=FAINT, linewidth=0.8, zorder=0)
    return ax, plot


FILM_COLOURS = [COLOURS[kind] for kind in ("comedy", "horror", "both")]
GENRE_COLOURS = [COLOURS[kind] for kind in ("comedy", "horror", "other")]


def plane(book):
    """Films and genres as arrows on the (funny, scary) plane."""
    ax, plot = funny_scary_plane("Comedies point right, horror points up", 32)
    films = zip(book.film_names[1:], book.film_table[1:].tolist(), FILM_COLOURS, strict=True)
    for (name, end, colour), shift in zip(films, [(4, -10), (-6, 9), (0, 9)], strict=True):
        arrow(plot, (0, 0), end, colour, width=2.8)
        beside(plot, end, name, shift, weight="bold")
    genres = zip(book.genre_names[1:], book.genre_table[1:].tolist(), GENRE_COLOURS, strict=True)
    for (name, end, colour), shift in zip(genres, [(6, 9), (0, 9), (-4, -9)], strict=True):
        dashed_arrow(plot, (0, 0), end, colour)
        beside(plot, end, name, shift)
    arrow(ax, (92, 12), (122, 12), INK, width=2.8)
    label(ax, 128, 12, "film", ha="left", weight="bold")
    dashed_arrow(ax, (182, 12), (212, 12), INK)
    label(ax, 218, 12, "genre", ha="left")
    return ax


def lookup(book):
    """A one-hot vector times a table is one row of the table."""
    ax = canvas(361, 170, "One-hot times table picks out a row")
    height, middle = 24, 73
    lit = ["other"] * len(book.film_names)
    lit[book.film_id] = "embedding"
    cells(ax, 8, middle, 20, height, [int(kind == "embedding") for kind in lit], lit)
    for place, name in enumerate(book.film_names):
        y = middle + height * (1.5 - place)
        weight = "bold" if place == book.film_id else "normal"
        label(ax, 18 + 20 * place, middle + 20, place)
        label(ax, 188, y, f"{name}  {place}", ha="right", weight=weight)
        cells(ax, 193, y, 34, height, map(number, book.film_table[place]), [lit[place]] * 2)
    picked = map(number, book.film_table[book.film_id])
    cells(ax, 285, middle, 34, height, picked, ["embedding"] * 2)
    label(ax, 100, middle, "×", TEXT)
    label(ax, 273, middle, "=", TEXT)
    start, end = (18 + 20 * book.film_id, middle - height / 2), (103, middle - 1.5 * height)
    arrow(ax, start, end, COLOURS["embedding"], "angle,angleA=-90,angleB=0,rad=0")
    names, width = book.film_table.shape
    headings = [(48, "one-hot", f"({names},)"), (227, "film table", f"({names}, {width})")]
    for x, heading, shape in [*headings, (319, f"row {book.film_id}", f"({width},)")]:
        label(ax, x, 135, heading, TEXT, weight="bold")
        label(ax, x, 11, shape)
    return ax


# ---- Section 3: bags -----------------------------------------------------------------------------


def offsets(book):
    """Ragged bags, laid flat as indices; offsets point at where each bag starts."""
    ax = canvas(400, 186, "Offsets say where each bag starts")
    width, left, flow = 46, 52, 250  # `left` and `flow`: where bags and indices begin
    strengths = [0.75, None, 0.22]
    starts = book.offsets.tolist()
    label(ax, 219, 142, "place")
    label(ax, 219, 116, "indices", TEXT, weight="bold")
    label(ax, 219, 36, "offsets", TEXT, weight="bold")
    arrow(ax, (154, 78), (186, 78))
    for place in range(len(book.indices)):
        label(ax, flow + width * (place + 0.5), 142, place)
    for b, (bag, start, strength) in enumerate(zip(book.bags, starts, strengths, strict=True)):
        y, x = 120 - 42 * b, flow + width * (b + 0.5)
        label(ax, 28, y, f"bag {b}", TEXT)
        label(ax, x, 14, f"bag {b}")
        if bag:
            names = [book.genre_names[i] for i in bag]
            kinds = ["embedding"] * len(bag)
            cells(ax, left, y, width, 34, bag, kinds, names, strength)
            cells(ax, flow + width * start, 116, width, 34, bag, kinds, names, strength)
            box(ax, x, 36, width, 24, start, "embedding", strength=strength)
        else:
            dashed_box(ax, left + width / 2, y, width, 34, "empty")
            dashed_box(ax, x, 36, width, 24, start, TEXT)
        arrow(ax, (x, 48), (flow + width * start + 3 * (b - 1), 98))
    return ax


# ---- Section 4: the bottom MLP -------------------------------------------------------------------


def bottom_mlp(book):
    """The 2-3-2 network: numbers on its units, weights on its lines."""
    ax = canvas(361, 236, "Two numbers become one more vector")
    hidden = torch.relu(book.hidden_sums)
    layers = [book.logs, hidden, book.vectors[0]]
    xs = [112, 210, 308]
    ys = [[149, 81], [182, 115, 48], [149, 81]]
    weights = [book.bottom_w1, book.bottom_w2]
    for layer, (table, share) in enumerate(zip(weights, (0.36, 0.33), strict=True)):
        for to, unit in enumerate(table.tolist()):
            for source, weight in enumerate(unit):
                start, end = (xs[layer], ys[layer][source]), (xs[layer + 1], ys[layer + 1][to])
                connection(ax, start, end, weight, share)
    kinds = ["dense", "other", "dense"]
    for x, places, values, kind in zip(xs, ys, layers, kinds, strict=True):
        for y, value in zip(places, values, strict=True):
            fill = tint(kind, STRENGTH[kind])
            style = {"facecolor": fill, "edgecolor": COLOURS[kind], "zorder": 3}
            ax.add_patch(Circle((x, y), 20, **style))
            label(ax, x, y, thousandths(value), TEXT, zorder=4)
    for y, bias, total in zip(ys[1], book.bottom_b1, book.hidden_sums, strict=True):
        if bias:
            label(ax, xs[1], y - 27, f"bias {number(bias)}")
        if total < 0:
            label(ax, xs[1], y - 39, f"ReLU: {thousandths(total)} → 0")
    label(ax, xs[2], 47, "dense vector", TEXT)
    for y, meaning, count in zip(ys[0], dense_meanings(), book.dense_row, strict=True):
        text = f"{textwrap.fill(meaning, 9)}\nlog(1 + {number(count)})"
        label(ax, xs[0] - 25, y, text, ha="right")
    return ax


def connection(ax, start, end, weight, share):
    """A line between two units, none for a weight of 0; the weight stands at `share` of the way."""
    if not weight:
        return
    ends = zip(start, end, strict=True)
    ax.plot(*ends, color=COLOURS["dense"], linewidth=1.6, zorder=1.5)
    x, y = ((1 - share) * a + share * b for a, b in zip(start, end, strict=True))
    patch = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    label(ax, x, y, number(weight), bbox=patch, zorder=2)


# ---- Section 5: what goes with what --------------------------------------------------------------


def additive(book):
    """What two fans click, and what a sum and a dot product can say about it."""
    ax = canvas(413, 160, "Sums can't say who likes what. Dot products can.")
    clicks = np.eye(2)  # each fan clicks the film of their genre, and only that
    fans, films = np.indices((2, 2)).reshape(2, 4)
    one_hots = np.hstack([np.eye(2)[fans], np.eye(2)[films]])  # (4, 2 fans + 2 films)
    effects = np.linalg.lstsq(one_hots, clicks.ravel(), rcond=None)[0]
    products = book.genre_table[1:3] @ book.film_table[1:3].T
    grids = [("what they click", clicks, "other"), ("additive model", one_hots @ effects, "other")]
    grids += [("dot product", products.numpy(), "interaction")]
    for left, (name, grid, kind) in zip((68, 184, 300), grids, strict=True):
        label(ax, left + 52, 12, name, TEXT, weight="bold")
        for place, value in enumerate(np.ravel(grid)):
            x, y = left + 26 + 52 * (place % 2), 88 - 38 * (place // 2)
            box(ax, x, y, 52, 38, thousandths(value), kind, strength=0.7 * max(value, 0), line=1)
        for place, film in enumerate(book.film_names[1:3]):
            label(ax, left + 26 + 52 * place, 117, film)
    for place, genre in enumerate(book.genre_names[1:3]):
        label(ax, 62, 88 - 38 * place, f"{genre}\nfan", ha="right")
    return ax


def plane_sum(book):
    """Comedy and horror, tip to tail, point at the horror-comedy."""
    ax, plot = funny_scary_plane("Comedy + horror points at the horror-comedy", 32)
    comedy, horror = book.genre_table[book.liked_ids].tolist()
    total = book.vectors[NAMES.index("liked")]
    dashed_arrow(plot, (0, 0), comedy, COLOURS["comedy"])
    dashed_arrow(plot, comedy, total.tolist(), COLOURS["horror"])
    arrow(plot, (0, 0), total.tolist(), INK)
    beside(plot, comedy, book.liked[0], (-24, -9))
    beside(
        plot, (comedy[0] + horror[0], comedy[1] + horror[1] / 2), book.liked[1], (4, 0), ha="left"
    )
    beside(plot, total.tolist(), " + ".join(book.liked), (0, 9))
    shifts = [(4, -16), (-4, 16), (-46, 2)]
    films = zip(book.film_names[1:], book.film_table[1:], FILM_COLOURS, shifts, strict=True)
    for name, film, colour, shift in films:
        product = (total @ film).item()
        arrow(plot, (0, 0), film.tolist(), colour, width=2.8)
        beside(plot, film.tolist(), f"{name}\n{number(round(product, 3))}", shift, weight="bold")
    label(ax, 164, 12, f"numbers: dot product with {' + '.join(book.liked)}")
    return ax


def interactions(book):
    """All dot products of the four vectors; the six below the diagonal are kept."""
    ax = canvas(277, 210, "Film and genres go together best")
    width, height, left, top = 50, 38, 70, 160
    largest = max(book.products[pair] for pair in book.kept)
    for j, name in enumerate(NAMES):
        y = top - height * (j + 0.5)
        label(ax, left + width * (j + 0.5), top + 12, name, TEXT)
        label(ax, 35, y + 7, name, TEXT)
        label(ax, 35, y - 8, vector(book.vectors[j]))
        for k in range(len(NAMES)):
            x = left + width * (k + 0.5)
            value = book.products[j, k]
            if (j, k) in book.kept:
                strength = 0.8 * (value / largest).item() ** 2  # squared: the largest jumps out
                box(ax, x, y, width, height, hundredths(value), "interaction", "", strength, 2.2)
            else:
                text = "itself" if j == k else "same\nagain"
                box(ax, x, y, width, height, "", "other")
                label(ax, x, y, text, color=COLOURS["other"])
    return ax


# ---- Section 6: sigmoid and log loss -------------------------------------------------------------


GUIDE = {"color": COLOURS["other"], "linewidth": 1, "linestyle": ":"}
MARK = {"marker": "o", "color": COLOURS["both"], "zorder": 3, "clip_on": False}


def curves(book):
    """A logit becomes a probability; a probability costs more the less it gave to what happened."""
    ax = canvas(452, 214, "Any logit becomes a probability")
    label(ax, 240, 201, "Being sure and wrong costs most", TEXT, ha="left", weight="bold")
    sigmoid_curve(ax, book.logit, book.probability)
    loss_curves(ax, book)
    return ax


def sigmoid_curve(ax, logit, probability):
    """The left half of the curves: the sigmoid, and Mira's logit on it."""
    plot = panel(ax, 32, 36, 178, 136, xlim=(-5, 5), ylim=(0, 1), yticks=[0, 0.5, 1])
    label(ax, 12, 182, "probability", ha="left")
    label(ax, 121, 11, "logit")
    logits = np.linspace(-5, 5, 101)
    plot.plot(logits, 1 / (1 + np.exp(-logits)), color=INK, linewidth=1.6)
    plot.plot([logit, logit, -5], [0, probability, probability], **GUIDE)
    plot.plot(logit, probability, **MARK)
    beside(plot, (logit, 0), f"{logit:.3f}", (4, 8), ha="left")
    beside(plot, (-5, probability), f"{probability:.3f}", (4, 8), ha="left")
    beside(plot, (logit, probability), "Mira", (8, -8), ha="left", weight="bold")


def loss_curves(ax, book):
    """The right half: the log loss if she clicks, and if she does not."""
    settings = {"xlim": (0, 1), "ylim": (0, 3.5), "xticks": [0, 0.5, 1], "yticks": [0, 1, 2, 3]}
    plot = panel(ax, 262, 36, 178, 136, **settings)
    label(ax, 244, 182, "log loss", ha="left")
    label(ax, 351, 11, "probability")
    chances = np.linspace(0.001, 0.999, 500)
    plot.plot(chances, -np.log(chances), color=INK, linewidth=1.6)
    plot.plot(chances, -np.log(1 - chances), color=INK, linewidth=1.6, linestyle="--")
    beside(plot, (np.exp(-3), 3), "if she clicks", (7, 0), ha="left")
    beside(plot, (1 - np.exp(-3), 3), "if she doesn't", (-7, 0), ha="right")
    chance = book.probability
    plot.plot([chance, chance], [0, book.loss_no_click], **GUIDE)
    plot.plot(chance, book.loss_click, **MARK)
    plot.plot(chance, book.loss_no_click, markerfacecolor="white", **MARK)
    beside(plot, (chance, book.loss_click), f"{book.loss_click:.3f}", (4, 9), ha="left")
    beside(plot, (chance, book.loss_no_click), f"{book.loss_no_click:.3f}", (-7, 6), ha="right")


# ---- Section 7: the gradient ---------------------------------------------------------------------


def gradient(book):
    """The genre table and the gradient of its rows: only those of her bag are lit."""
    ax = canvas(271, 160, "Only looked-up rows get a gradient")
    height = 24
    for x, heading in [(124, "genre table"), (220, "gradient")]:
        label(ax, x, 122, heading, TEXT, weight="bold")
    rows = zip(book.genre_names, book.genre_table, book.genre_gradient, strict=True)
    for place, (name, vector_of_it, slope) in enumerate(rows):
        y = 96 - height * place
        lit = place in book.liked_ids
        kinds = ["embedding" if lit else "other"] * 2
        label(ax, 82, y, f"{name}  {place}", ha="right", weight="bold" if lit else "normal")
        cells(ax, 90, y, 34, height, map(number, vector_of_it), kinds)
        cells(ax, 174, y, 46, height, map(thousandths, slope), kinds)
    return ax


# ---- Section 9: AUC ------------------------------------------------------------------------------


def auc(book):
    """Six impressions on a line by prediction; the pairs in the wrong order are joined."""
    labels, predictions = book.six_labels, book.six_predictions
    clicks, others = predictions[labels == 1], predictions[labels == 0]
    wrong = [(click, other) for click in clicks for other in others if click < other]
    pairs = len(clicks) * len(others)
    right = pairs - len(wrong)
    title = f"{right} of {pairs} pairs in the right order: AUC {right / pairs:.2f}"
    ax = canvas(413, 158, title)
    left, length, line, up, down = 68, 320, 76, 100, 52
    ax.plot([left, left + length], [line, line], color=COLOURS["other"], linewidth=1)
    for tick in (0, 0.5, 1):
        ax.plot(
            [left + length * tick] * 2, [line - 3, line + 3], color=COLOURS["other"], linewidth=1
        )
        label(ax, left + length * tick, line - 10, number(tick))
    label(ax, left + 0.87 * length, line - 10, "prediction")
    colour = COLOURS["interaction"]
    rows = [(up, 15, "click", clicks, colour), (down, -15, "no click", others, "white")]
    for y, shift, name, values, fill in rows:
        label(ax, 56, y, name, TEXT, ha="right")
        for value in values:
            ring = {"facecolor": fill, "edgecolor": colour, "linewidth": 2, "zorder": 3}
            ax.add_patch(Circle((left + length * value, y), 6, **ring))
            label(ax, left + length * value, y + shift, number(value))
    for click, other in wrong:
        start, end = (left + length * click, up), (left + length * other, down)
        ax.plot(*zip(start, end, strict=True), color=INK, linewidth=2)
        text = f"the wrong pair: no click at {number(other)}, click at {number(click)}"
        label(ax, left + length * (click + other) / 2, 14, text, weight="bold")
    return ax


# ---- Section 10: the split -----------------------------------------------------------------------


def split(book):
    """The parts of Criteo's file, from its first line to its last."""
    ax = canvas(400, 158, "Train on the past, test on the future")
    end = CRITEO_EXAMPLES
    start = -(-6 * end // 7)
    middle = (start + end + 1) // 2
    left, block, y = 10, 380 / 7, 76
    train, edge = left + 6 * block, left + 6.5 * block
    for place in range(6):
        box(ax, left + (place + 0.5) * block, y, block, 32, "", "other", strength=0.25, line=1)
    box(ax, (train + edge) / 2, y, block / 2, 32, "", "other", strength=1, line=1)
    box(ax, edge + block / 4, y, block / 2, 32, "", "other", strength=0, line=1)
    bracket(ax, left, train - 2, 102)
    label(ax, (left + train) / 2, 112, f"train: {start:,}", TEXT, weight="bold")
    bracket(ax, train + 1, edge - 1, 102)
    label(ax, train + 1, 112, f"test\n{middle - start:,}", above=True, ha="left")
    label(ax, 390, 50, f"validation: {end - middle:,}", ha="right")
    arrow(ax, (left, 24), (390, 24))
    label(ax, left, 12, f"order in Criteo's file, {end:,} examples", ha="left")
    return ax


# ---- Appendix E: the butterfly shuffle -----------------------------------------------------------


def butterfly(book):
    """What four ranks have before and after the shuffle; the shade is that of the tables' rank."""
    ax = canvas(400, 206, "The shuffle gives every rank all tables")
    grid = [[(sender, receiver) for receiver in range(4)] for sender in range(4)]
    halves = [(48, "before", "own tables, all examples", grid)]
    halves += [(240, "after", "all tables, own examples", book.butterfly(grid))]
    width, height = 38, 28
    for left, when, content, blocks in halves:
        middle = left + 2 * width
        label(ax, middle, 174, when, TEXT, weight="bold")
        label(ax, middle, 160, content)
        for rank, row_of_blocks in enumerate(blocks):
            y = 136 - height * rank
            for place, (sender, receiver) in enumerate(row_of_blocks):
                x, text = left + width * (place + 0.5), f"{sender}→{receiver}"
                box(
                    ax,
                    x,
                    y,
                    width,
                    height,
                    text,
                    "embedding",
                    strength=[0.08, 0.36, 0.68, 1][sender],
                )
    for rank in range(4):
        label(ax, 42, 136 - height * rank, f"rank {rank}", ha="right")
    arrow(ax, (206, 94), (234, 94), width=2)
    label(ax, 200, 16, "0→1: from the tables of rank 0, for the examples of rank 1")
    return ax


# ---- Curves of the appendices: computed from assumptions, or measured ----------------------------


def mlp_widths(width, bottom, top):
    """All layer widths of both MLPs of a DLRM with 13 dense numbers and 26 tables."""
    return [13, *bottom, width], [width + 351, *top, 1]


def seconds_a_step(devices, width, bottom, top, samples=65_536, flop_rate=40e12, network=25e9):
    """Seconds of one device in one step: computing, the shuffle both ways, the all-reduce, (3,).

    A DLRM with 13 dense numbers and 26 tables; `bottom` and `top` are its hidden layers.
    """
    pairs = [pair for widths in mlp_widths(width, bottom, top) for pair in pairwise(widths)]
    weights = sum(inputs * outputs for inputs, outputs in pairs)
    biases = sum(outputs for _, outputs in pairs)
    away = 1 - 1 / devices  # the share of what a device has that goes to others
    compute = samples / devices * 6 * weights / flop_rate
    shuffle = 2 * samples / devices * away * 26 * width * 4 / network
    all_reduce = 2 * away * 4 * (weights + biases) / network
    return np.array([compute, shuffle, all_reduce])


def devices(book):
    """What limits a step of MLPerf's DLRM on 1 to 4,096 devices."""
    numbers = 2 ** np.arange(13)
    layers = [512, 256], [1024, 1024, 512, 256]
    milliseconds = 1000 * np.array([seconds_a_step(n, 128, *layers) for n in numbers])  # (13, 3)
    crossing = numbers[np.argmax(milliseconds[:, 2] > milliseconds[:, :2].sum(1))]
    table_gigabytes = 204_184_588 * 128 * 4 / 1e9
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    ax = figure.subplots()
    names = {
        "computing": INK,
        "shuffle": COLOURS["embedding"],
        "all-reduce\nof the MLPs": COLOURS["dense"],
    }
    for (name, colour), line in zip(names.items(), milliseconds.T, strict=True):
        told = line > 0  # one device sends nothing
        ax.loglog(numbers[told], line[told], color=colour, linewidth=2)
        ax.text(4700, line[-1], name, color=colour, va="center")
    ax.axvline(crossing, color=INK, linewidth=0.8, linestyle=":")
    mlps = sum(n * m + m for widths in mlp_widths(128, *layers) for n, m in pairwise(widths))
    each = table_gigabytes / crossing
    tables = f"tables: {table_gigabytes:.1f} GB, {each:.1f} GB on each of {crossing}"
    memory = f"{tables}\nMLPs: {4 * mlps / 1e6:.1f} MB on each"
    ax.text(1.15 * crossing, 9, memory)
    ax.set(xlabel="devices", ylabel="milliseconds in a step")
    ax.set_title(
        f"From {crossing} devices on, the copied MLPs cost more than all else", fontsize=11
    )
    ax.set_xticks([1, 4, 16, 64, 256, 1024, 4096])
    ax.set_xticklabels(["1", "4", "16", "64", "256", "1,024", "4,096"])
    ax.set_yticks([0.01, 0.1, 1, 10])
    ax.set_yticklabels(["0.01", "0.1", "1", "10"])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def data_sizes(book):
    """How far each model stays above the best possible log loss, against training examples."""
    runs = pd.read_csv(HERE / "measured" / "data_sizes.csv")
    runs["gap"] = runs["log_loss"] - runs["truth_log_loss"]
    gaps = runs.groupby(["model", "rows"])["gap"].agg(["mean", "min", "max"])
    label_heights = {"plain MLP": 0.036, "DCN": 0.051}  # their lines end too close for two labels
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    ax = figure.subplots()
    for name in gaps.index.unique("model"):
        gap = gaps.loc[name]
        colour = COLOURS["interaction"] if name == "DLRM" else COLOURS["other"]
        ax.plot(gap.index, gap["mean"], "o-", color=colour, markersize=4)
        ax.fill_between(gap.index, gap["min"], gap["max"], color=colour, alpha=0.15, linewidth=0)
        height = label_heights.get(name, gap["mean"].iloc[-1])
        ax.text(2_250_000, height, name, color=colour, va="center")
    ax.set(xscale="log", ylim=(0, 0.215), xlabel="training examples")
    ax.set_ylabel("log loss above the best possible")
    ax.set_title("More examples close the gap, and DLRM needs the fewest", fontsize=11)
    ax.set_xticks(list(gaps.index.unique("rows")))
    ax.set_xticklabels([f"{rows:,}" for rows in gaps.index.unique("rows")])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


FIGURES = (
    architecture,
    row,
    plane,
    lookup,
    offsets,
    bottom_mlp,
    additive,
    plane_sum,
    interactions,
    curves,
    gradient,
    auc,
    split,
    butterfly,
    devices,
    data_sizes,
)


def render_graph(dot, path):
    """Draw a Graphviz graph (torchviz's, say) as SVG with the renderer that pip installed.

    torchviz names nodes by memory addresses; renumbered, the same graph gives the same file.
    """
    number, dot = {}, dot.copy()
    dot.node_attr.update(fontname="Courier New", margin="0.12,0.06")
    source = re.sub(r"\b\d{9,}\b", lambda a: str(number.setdefault(a[0], len(number))), dot.source)
    command = [Path(sys.executable).with_name("graphviz-pure"), "-Tsvg"]
    svg = subprocess.run(command, input=source.encode(), capture_output=True, check=True).stdout
    part = Path(f"{path}.part")  # monospace is as wide, where a browser lacks the font
    part.write_bytes(svg.replace(b'"Courier New"', b'"Courier New,monospace"'))
    part.replace(path)


def draw_all(book, folder):
    """Write every figure into `folder`, as NAME.svg."""
    example = worked_example(book)
    # No date and no version in the file: the same drawing has the same bytes.
    metadata = {"Date": None, "Creator": None}
    with matplotlib.rc_context(SVG):
        for draw in FIGURES:
            draw(example).figure.savefig(Path(folder) / f"{draw.__name__}.svg", metadata=metadata)


if __name__ == "__main__":
    draw_all(dlrm_utils.load_notebook(), HERE)
