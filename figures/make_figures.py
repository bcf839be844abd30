"""Draw the teaching figures of DLRM.ipynb, as SVG files beside this program. Run: python figures/make_figures.py

Every name and number comes from the notebook's own hand-typed example, so no figure can disagree with the text.
All lengths are in points, like the type sizes. Two runs write the same bytes.
"""
import ast
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from notebook_definitions import code_cells, load, source

TEXT, SMALL = 11, 9         # the two type sizes, in points
INK = "#1a202c"
# How much of its colour a filled box takes: the fills also differ in lightness, so that they can be told apart in black and white.
STRENGTH = dict(other=0.08, dense=0.22, embedding=0.55, interaction=0.60)

# Text as paths looks the same without the font; a fixed salt makes the ids within the file the same in every run.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "DLRM", "font.family": "DejaVu Sans"})


def typed(name):
    """The value that the notebook first assigns to `name`, for names that load() leaves out."""
    assignments = [node for cell in code_cells() for node in ast.parse(source(cell)).body if isinstance(node, ast.Assign)]
    return next(eval(ast.unparse(node.value)) for node in assignments if ast.unparse(node.targets[0]) == name)


COLOURS, NAMES = typed("COLOURS"), typed("vector_names")


def worked_example():
    """What the notebook types, and all that its own model makes of it, up to the probability."""
    book = load()
    model = book.by_hand_model()
    fields = [book.liked_ids, [book.film_id], [book.hour_id]]
    logs = torch.log1p(book.dense_row)
    with torch.no_grad():
        sums = [table(*book.to_offsets([bag]))[0] for table, bag in zip(model.tables, fields)]
        vectors = torch.stack([model.bottom(logs), *sums])                         # (4, 2)
        products = vectors @ vectors.T                                             # (4, 4)
        kept = list(zip(*model.kept.tolist()))                                     # the six pairs (row, column)
        pairs = torch.stack([products[j, k] for j, k in kept])
        logit = model.top(torch.cat([vectors[0], pairs]))
        whole = model(logs[None], *book.as_batch(book.liked_ids, book.film_id, book.hour_id))
    assert torch.allclose(logit, whole), "the figures and the model disagree"
    return SimpleNamespace(**vars(book), model=model, fields=fields, logs=logs, vectors=vectors, products=products, kept=kept,
                           pairs=pairs, logit=logit.item(), probability=torch.sigmoid(logit).item())


def number(value):
    """A number as it was typed: 3 for 3.0, and a true minus sign."""
    return f"{value:g}".replace("-", "−")


def vector(values, form="{:.2f}".format):
    return "[" + ", ".join(map(form, values)) + "]"


def several(word, bag, between=", "):
    """'id 3' or 'ids 1, 2'."""
    return f"{word}{'s' * (len(bag) != 1)} {between.join(map(str, bag))}"


def widths(mlp):
    """The widths of an MLP's layers; every other layer is a ReLU, which changes no width."""
    return " → ".join(str(n) for n in [mlp[0].in_features, *(layer.out_features for layer in mlp[::2])])


def canvas(width, height):
    """An empty white drawing. Every width is that of the notebook's <img> over 1.55, so type is equally large in all figures."""
    ax = Figure(figsize=(width / 72, height / 72), facecolor="white").add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return ax


def label(ax, x, y, text, size=SMALL, above=False, **options):
    """Lines of text centred on (x, y), or, if `above`, with the last line at y and the others above it."""
    lines = str(text).split("\n")
    top = y + 1.2 * size * (len(lines) - 1) * (1 if above else 0.5)
    for i, line in enumerate(lines):     # set on baselines: centring by matplotlib lifts a word with a "p" above its neighbours
        ax.text(x, top - 1.2 * size * i - 0.36 * size, line, **{"size": size, "color": INK, "ha": "center", **options})


def box(ax, x, y, width, height, text, kind, note="", step=False, line=None):
    """A box centred on (x, y), with a small note below its text. A value is filled; a step of computing is round and white."""
    line = line or (1.6 if step else 0.6 if kind == "other" else 1.0)
    colour, corner = COLOURS[kind], (x - width / 2, y - height / 2)
    fill = "white" if step else [1 - STRENGTH[kind] * (1 - part) for part in to_rgb(colour)]
    shape = "round,pad=0,rounding_size=7" if step else "square,pad=0"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=fill, edgecolor=colour, linewidth=line,
                                zorder=line))     # thick outlines lie over thin ones
    label(ax, x, y + (7 if note else 0), text, TEXT)
    label(ax, x, y - 8, note)


def cells(ax, left, y, width, height, texts, kinds, notes=None):
    """Boxes side by side, the first one's left edge at `left`."""
    for i, (text, kind, note) in enumerate(zip(texts, kinds, notes or [""] * len(kinds))):
        box(ax, left + (i + 0.5) * width, y, width, height, text, kind, note)


def arrow(ax, start, end, kind="other", path="arc3"):
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>,head_width=0.22,head_length=0.45", connectionstyle=path,
                                                color=COLOURS[kind], linewidth=1.2, shrinkA=0, shrinkB=0))


def span(ax, left, right, y):
    """A horizontal bracket, open below."""
    ax.plot([left, left, right, right], [y - 4, y, y, y - 4], color=COLOURS["other"], linewidth=1)


def row(book):
    """One impression: dense numbers, sparse names with their ids, and the label."""
    ax, y = canvas(400, 124), 42
    typing = next(source(cell) for cell in code_cells() if "dense_row = " in source(cell))
    meanings = re.search("dense_row = .*# dense: (.*)", typing)[1].split(", ")
    above = [*(textwrap.fill(meaning, 9) for meaning in meanings), *NAMES[1:], "click"]
    inside = [*map(number, book.dense_row), "\n".join(book.liked), book.film.replace(" ", "\n"), book.hour, number(book.clicked)]
    below = ["", "", *(several("id", bag) for bag in book.fields), ""]
    places = [(37, 54, "dense"), (91, 54, "dense"), *((x, 62, "embedding") for x in (167, 229, 291)), (365, 50, "other")]
    for (x, width, kind), head, text, foot in zip(places, above, inside, below, strict=True):
        label(ax, x, y + 27, head, above=True)
        box(ax, x, y, width, 36, text, kind)
        label(ax, x, y - 28, foot)
    for left, right, heading in [(10, 118, "dense"), (136, 322, "sparse"), (340, 390, "label")]:
        span(ax, left, right, y + 60)
        label(ax, (left + right) / 2, y + 70, heading, TEXT, weight="bold")
    return ax


def lookup(book):
    """A one-hot vector times a table is one row of the table."""
    ax, height, middle = canvas(361, 146), 24, 73
    level = lambda place: middle + height * (1.5 - place)           # of a table row
    lit = ["embedding" if place == book.film_id else "other" for place in range(len(book.film_names))]
    cells(ax, 8, middle, 20, height, [int(kind == "embedding") for kind in lit], lit)
    for place, name in enumerate(book.film_names):
        label(ax, 18 + 20 * place, middle + 20, place)
        label(ax, 188, level(place), f"{name}  {place}", ha="right", weight="bold" if place == book.film_id else "normal")
        cells(ax, 193, level(place), 34, height, map(number, book.film_table[place]), [lit[place]] * 2)
    cells(ax, 285, middle, 34, height, map(number, book.film_table[book.film_id]), ["embedding"] * 2)
    label(ax, 100, middle, "×", TEXT)
    label(ax, 273, middle, "=", TEXT)
    arrow(ax, (18 + 20 * book.film_id, middle - height / 2), (103, level(book.film_id)), "embedding", "angle,angleA=-90,angleB=0,rad=0")
    names, width = book.film_table.shape
    headings = [(48, "one-hot", f"({names},)"), (227, "film table", f"({names}, {width})"), (319, f"row {book.film_id}", f"({width},)")]
    for x, heading, shape in headings:
        label(ax, x, 135, heading, TEXT, weight="bold")
        label(ax, x, 11, shape)
    return ax


def offsets(book):
    """Ragged bags, laid flat as indices; offsets point at where each bag starts."""
    ax, width, left, flow = canvas(400, 148), 46, 52, 250     # `left` and `flow`: where bags and indices begin
    draw_ids = lambda bag, x, y: cells(ax, x, y, width, 34, bag, ["embedding"] * len(bag), [book.genre_names[i] for i in bag])
    for b, bag in enumerate(book.bags):
        y = 116 - 42 * b
        label(ax, 28, y, f"bag {b}", TEXT)
        draw_ids(bag, left, y)
        if not bag:
            ax.add_patch(Rectangle((left, y - 17), width, 34, fill=False, edgecolor=COLOURS["other"], linestyle=(0, (3, 3))))
            label(ax, left + width / 2, y, "empty")
    arrow(ax, (154, 74), (186, 74))
    draw_ids(book.indices.tolist(), flow, 108)
    for place in range(len(book.indices)):
        label(ax, flow + width * (place + 0.5), 134, place)
    for b, start in enumerate(book.offsets.tolist()):
        x = flow + width * (b + 0.5)
        box(ax, x, 36, width, 24, start, "other")
        label(ax, x, 14, f"bag {b}")
        arrow(ax, (x, 48), (flow + width * start, 90))
    label(ax, 219, 134, "place")
    label(ax, 219, 108, "indices", TEXT, weight="bold")
    label(ax, 219, 36, "offsets", TEXT, weight="bold")
    return ax


def interactions(book):
    """All dot products of the four vectors; the six below the diagonal are kept."""
    ax, width, height, left, top = canvas(277, 184), 50, 38, 70, 160
    for j, name in enumerate(NAMES):
        y = top - height * (j + 0.5)
        label(ax, left + width * (j + 0.5), top + 12, name, TEXT)
        label(ax, 35, y + 7, name, TEXT)
        label(ax, 35, y - 8, vector(book.vectors[j]))
        for k in range(len(NAMES)):
            x = left + width * (k + 0.5)
            if (j, k) in book.kept:
                box(ax, x, y, width, height, f"{book.products[j, k]:.2f}", "interaction", line=2.2)
            else:
                box(ax, x, y, width, height, "", "other")
                label(ax, x, y, "itself" if j == k else "same\nagain", color=COLOURS["other"])
    return ax


def towers(ax, book, columns, width):
    """The lower half of the architecture: dense numbers and sparse fields become four vectors, one a column."""
    inputs = [vector(book.dense_row, number), ", ".join(book.liked), book.film, book.hour]
    for c, (x, name) in enumerate(zip(columns, NAMES)):
        kind = "embedding" if c else "dense"
        label(ax, x, 11, f"sparse: {name}" if c else f"{name} numbers")
        box(ax, x, 32, width, 24, inputs[c], kind)
        box(ax, x, 192, width, 24, vector(book.vectors[c]), kind)
        for low, high in [(44, 64), (100, 120), (156, 180)]:
            arrow(ax, (x, low), (x, high))
    box(ax, columns[0], 82, width, 36, "log(1 + x)", "dense", vector(book.logs), step=True)
    box(ax, columns[0], 138, width, 36, "bottom MLP", "dense", widths(book.model.bottom), step=True)
    for x, bag, name, table in zip(columns[1:], book.fields, ["genre", "film", "hour"], book.model.tables):
        box(ax, x, 82, width, 36, several("id", bag), "embedding", f"bag of {len(bag)}")
        box(ax, x, 138, width, 36, f"{name} table", "embedding", f"embedding, {table.num_embeddings} × {table.embedding_dim}", step=True)
        label(ax, x + 8, 166, several("row", bag, " + "), ha="left")


def architecture(book):
    """The whole model, from the impression at the bottom to the probability at the top."""
    ax, columns = canvas(490, 488), [57, 176, 298, 420]
    towers(ax, book, columns, 98)
    for x in columns[1:]:
        arrow(ax, (x, 204), (x, 228))
    arrow(ax, (columns[0], 204), (columns[0], 290))          # past the dot products ...
    arrow(ax, (columns[0], 246), (114, 246))                 # ... and into them
    box(ax, 298, 246, 368, 36, "dot products of all pairs", "interaction",
        f"{len(book.vectors)} vectors → {len(book.pairs)} products", step=True)
    arrow(ax, (298, 264), (298, 290))
    cells(ax, 8, 309, 49, 38, [f"{v:.2f}" for v in book.vectors[0]], ["dense"] * 2, ["dense[0]", "dense[1]"])
    cells(ax, 114, 309, 368 / 6, 38, [f"{v:.2f}" for v in book.pairs], ["interaction"] * 6,
          [f"{NAMES[j]}·{NAMES[k]}" for j, k in book.kept])
    span(ax, 8, 482, 336)
    label(ax, 253, 348, f"concatenated: {book.model.top[0].in_features} numbers", ha="left")
    box(ax, 245, 378, 120, 36, "top MLP", "other", widths(book.model.top), step=True)
    box(ax, 245, 424, 120, 24, f"logit {book.logit:.3f}", "other")
    label(ax, 253, 446, "sigmoid", ha="left")
    box(ax, 245, 468, 120, 24, f"probability {book.probability:.2f}", "other")
    for low, high in [(336, 360), (396, 412), (436, 456)]:
        arrow(ax, (245, low), (245, high))
    return ax


def main():
    book = worked_example()
    for draw in (architecture, row, lookup, offsets, interactions):
        # No date and no version in the file: the same drawing has the same bytes.
        draw(book).figure.savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
