"""Draw the teaching figures of DLRM.ipynb, as SVG files beside this program.

Every name and number comes from the notebook's own hand-typed example and its own model, so no
figure can disagree with the text. Two runs write the same bytes.
"""

import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torchviz
from matplotlib.patches import Circle

from shapes import (
    COLOURS,
    FAINT,
    GUIDE,
    INK,
    MARK,
    PATCH,
    SVG,
    TEXT,
    arrow,
    box,
    bracket,
    canvas,
    cells,
    circle,
    connection,
    dashed_arrow,
    dashed_box,
    dot,
    draw_graph,
    funny_scary_plane,
    hundredths,
    label,
    number,
    panel,
    rounded,
    save,
    several,
    slider,
    tag,
    thousandths,
    tick,
    tint,
    trapezoid,
    vector,
    widths,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import dlrm_models  # noqa: E402
import dlrm_utils  # noqa: E402

NAMES = ["dense", "liked", "film", "hour"]  # of the four vectors, as in section 5
DENSE_MEANINGS = ["films watched this week", "trailers skipped"]  # as section 1 says beside them
STEP_RATE = 0.5  # of section 8's one step of learning
CRITEO_EXAMPLES = 45_840_617  # the labelled file, as section 11 counts it
FILM_COLOURS = [COLOURS[kind] for kind in ("comedy", "horror", "both")]
GENRE_COLOURS = [COLOURS[kind] for kind in ("comedy", "horror", "other")]


def worked_example(book):
    """What the notebook types, and what its model makes of it, up to the gradients."""
    made = SimpleNamespace(**vars(book))
    model, made.logs = book.hand_model, book.her_dense[0]
    made.fields = [ids.tolist() for ids in book.her_indices]
    with torch.no_grad():
        made.hidden_sums = model.bottom[0](made.logs)  # (3,), before their ReLU
        bags = model.tables(book.her_indices, book.her_offsets)[0]  # (3, 2)
        made.vectors = torch.cat([model.bottom(made.logs)[None], bags])  # (4, 2)
    made.products = made.vectors @ made.vectors.T  # (4, 4)
    made.kept = [divmod(place, 4) for place in model.kept.tolist()]  # row and column
    made.chances = {}  # of every film, for her, that evening
    for film, name in enumerate(book.film_names[1:], 1):
        bags = [book.her_indices[0], torch.tensor([film]), book.her_indices[2]]
        made.chances[name] = model(book.her_dense, bags, book.her_offsets).sigmoid().item()
    logit = model(book.her_dense, book.her_indices, book.her_offsets)
    loss = torch.nn.BCEWithLogitsLoss()(logit, torch.tensor([book.clicked]))
    tables = [table.weight for table in model.tables]
    made.gradients = [slope.to_dense() for slope in torch.autograd.grad(loss, tables)]
    made.logit, made.probability = logit.item(), torch.sigmoid(logit).item()
    made.loss_click, made.loss_no_click = loss.item(), -np.log(1 - made.probability)
    return made


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
    rounded(ax, 282, 246, 348, 36, "dot products of all pairs", "interaction", counts)
    arrow(ax, (282, 264), (282, 290))
    notes = ["dense[0]", "dense[1]"]
    cells(ax, 8, 309, 46, 38, map(hundredths, book.vectors[0]), ["dense"] * 2, notes)
    pairs = [hundredths(book.products[pair]) for pair in book.kept]
    notes = [f"{NAMES[j]}·{NAMES[k]}" for j, k in book.kept]
    cells(ax, 108, 309, 58, 38, pairs, ["interaction"] * 6, notes)
    bracket(ax, 8, 456, 336)
    label(ax, top + 8, 348, f"concatenated: {book.top_w1.shape[1]} numbers", ha="left")
    rounded(ax, top, 378, 124, 36, "top MLP", "other", widths(book.hand_model.top))
    box(ax, top, 424, 124, 24, f"logit {book.logit:.3f}", "other")
    label(ax, top + 8, 446, "sigmoid", ha="left")
    box(ax, top, 468, 124, 24, f"probability {book.probability:.2f}", "other", line=1.6)
    for low, high in [(336, 360), (396, 412), (436, 456)]:
        arrow(ax, (top, low), (top, high))
    return ax


def towers(ax, book, columns, width):
    """The architecture's lower half: numbers and names become four vectors, one a column."""
    inputs = [vector(book.dense_row, number), ", ".join(book.liked), book.film, book.hour]
    for x, name, value, made in zip(columns, NAMES, inputs, book.vectors):
        kind = "dense" if name == "dense" else "embedding"
        label(ax, x, 11, "dense numbers" if name == "dense" else f"sparse: {name}")
        box(ax, x, 32, width, 24, value, kind)
        box(ax, x, 192, width, 24, vector(made), kind)
        for low, high in [(44, 64), (100, 120), (156, 180)]:
            arrow(ax, (x, low), (x, high))
    rounded(ax, columns[0], 82, width, 36, "log(1 + x)", "dense", vector(book.logs))
    rounded(ax, columns[0], 138, width, 36, "bottom MLP", "dense", widths(book.hand_model.bottom))
    names = ["genre", *NAMES[2:]]
    for x, bag, name, table in zip(columns[1:], book.fields, names, book.hand_model.tables):
        box(ax, x, 82, width, 36, several("id", bag), "embedding", f"bag of {len(bag)}")
        shape = f"embedding, {table.num_embeddings} × {table.embedding_dim}"
        rounded(ax, x, 138, width, 36, f"{name} table", "embedding", shape)
        label(ax, x + 8, 167, several("row", bag, " + "), ha="left")


def row(book):
    """One impression: dense numbers, sparse names with their ids, and the label."""
    ax, y = canvas(400, 152, "An impression is a few numbers and a few names"), 42
    heads = [*(textwrap.fill(meaning, 9) for meaning in DENSE_MEANINGS), *NAMES[1:], "click"]
    sparse = ["\n".join(book.liked), book.film.replace(" ", "\n"), book.hour]
    texts = [*map(number, book.dense_row), *sparse, number(book.clicked)]
    notes = ["", "", *(several("id", bag) for bag in book.fields), ""]
    places = [(37, 54), (91, 54), (167, 62), (229, 62), (291, 62), (365, 50)]
    kinds = ["dense"] * 2 + ["embedding"] * 3 + ["other"]
    for (x, width), kind, head, text, note in zip(places, kinds, heads, texts, notes):
        label(ax, x, y + 27, head, above=True)
        box(ax, x, y, width, 36, text, kind)
        label(ax, x, y - 28, note)
    for left, right, half in [(10, 118, "dense"), (136, 322, "sparse"), (340, 390, "label")]:
        bracket(ax, left, right, y + 60)
        label(ax, (left + right) / 2, y + 70, half, TEXT, weight="bold")
    return ax


def plane(book):
    """Films and genres as arrows on the (funny, scary) plane."""
    ax, plot = funny_scary_plane("Comedies point right, horror points up")
    films = zip(book.film_names[1:], book.film_table[1:].tolist(), FILM_COLOURS)
    for (name, end, colour), shift in zip(films, [(4, -10), (-6, 9), (0, 9)]):
        arrow(plot, (0, 0), end, colour, width=2.8)
        tag(plot, end, name, shift, weight="bold")
    genres = zip(book.genre_names[1:], book.genre_table[1:].tolist(), GENRE_COLOURS)
    for (name, end, colour), shift in zip(genres, [(6, 9), (22, -3), (-4, -9)]):
        dashed_arrow(plot, (0, 0), end, colour)
        tag(plot, end, name, shift)
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
    headings = [(48, "one-hot", "(4,)"), (227, "film table", "(4, 2)")]
    for x, heading, shape in [*headings, (319, f"row {book.film_id}", "(2,)")]:
        label(ax, x, 135, heading, TEXT, weight="bold")
        label(ax, x, 11, shape)
    return ax


def offsets(book):
    """Ragged bags, laid flat as indices; offsets point at where each bag starts."""
    ax = canvas(400, 186, "Offsets say where each bag starts")
    width, left, flow = 46, 52, 250  # `left` and `flow`: where bags and indices begin
    strengths, starts = [0.75, None, 0.22], book.offsets.tolist()
    label(ax, 219, 142, "place")
    label(ax, 219, 116, "indices", TEXT, weight="bold")
    label(ax, 219, 36, "offsets", TEXT, weight="bold")
    arrow(ax, (154, 78), (186, 78))
    for place in range(len(book.indices)):
        label(ax, flow + width * (place + 0.5), 142, place)
    for b, (bag, start, strength) in enumerate(zip(book.bags, starts, strengths)):
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
        # An empty bag starts where the next one does: both arrows end well inside its first box.
        draw, end = (arrow, 14) if bag else (dashed_arrow, 8)
        end = 32 if starts.count(start) > 1 and bag else end
        draw(ax, (x, 48), (flow + width * start + end, 104), COLOURS["other"])
    return ax


def bottom_mlp(book):
    """The 2-3-2 network: numbers on its units, weights on its lines."""
    ax = canvas(361, 236, "Two numbers become one more vector")
    layers = [book.logs, torch.relu(book.hidden_sums), book.vectors[0]]
    xs, kinds = [112, 210, 308], ["dense", "other", "dense"]
    ys = [[149, 81], [182, 115, 48], [149, 81]]
    for layer, (table, share) in enumerate([(book.bottom_w1, 0.36), (book.bottom_w2, 0.33)]):
        for to, unit in enumerate(table.tolist()):
            for source, weight in enumerate(unit):
                start, end = (xs[layer], ys[layer][source]), (xs[layer + 1], ys[layer + 1][to])
                connection(ax, start, end, weight, share)
    for x, places, values, kind in zip(xs, ys, layers, kinds):
        for y, value in zip(places, values):
            circle(ax, x, y, thousandths(value), kind)
    for y, bias, total in zip(ys[1], book.bottom_b1, book.hidden_sums):
        if bias:
            label(ax, xs[1], y - 27, f"bias {number(bias)}")
        if total < 0:
            label(ax, xs[1], y - 39, f"ReLU: {thousandths(total)} → 0")
    dashed_box(ax, xs[2], 115, 54, 122, "")  # both are one vector
    label(ax, xs[2], 40, "dense vector", TEXT)
    label(ax, xs[2], 26, "no ReLU here")
    for y, meaning, value in zip(ys[0], DENSE_MEANINGS, book.dense_row):
        text = f"{textwrap.fill(meaning, 9)}\nlog(1 + {number(value)})"
        label(ax, xs[0] - 25, y, text, ha="right")
    return ax


def additive(book):
    """What two fans click, and what a sum and a dot product can say about it."""
    ax = canvas(413, 160, "Sums can't say who likes what. Dot products can.")
    clicks = np.eye(2)  # each fan clicks the film of their genre, and only that
    sums = clicks.mean(1, keepdims=True) + clicks.mean(0) - clicks.mean()  # the best effects
    products = book.genre_table[1:3] @ book.film_table[1:3].T
    grids = [("what they click", clicks, "other"), ("additive model", sums, "other")]
    grids += [("dot product", products.numpy(), "interaction")]
    for left, (name, grid, kind) in zip((68, 184, 300), grids):
        label(ax, left + 52, 12, name, TEXT, weight="bold")
        for place, value in enumerate(np.ravel(grid)):
            x, y = left + 26 + 52 * (place % 2), 88 - 38 * (place // 2)
            strength, hatch = 0.7 * max(value, 0), "//" * int(value < 0)  # negative: hatched
            box(ax, x, y, 52, 38, "", kind, strength=strength, line=1, hatch=hatch)
            label(ax, x, y, thousandths(value), TEXT, bbox=PATCH if hatch else None)
        for place, film in enumerate(book.film_names[1:3]):
            label(ax, left + 26 + 52 * place, 117, film)
    for place, genre in enumerate(book.genre_names[1:3]):
        label(ax, 62, 88 - 38 * place, f"{genre}\nfan", ha="right")
    return ax


def plane_sum(book):
    """Comedy and horror, tip to tail, point at the horror-comedy."""
    ax, plot = funny_scary_plane("Comedy + horror points at the horror-comedy")
    comedy, horror = book.genre_table[book.liked_ids].tolist()
    total = book.vectors[NAMES.index("liked")]
    dashed_arrow(plot, (0, 0), comedy, COLOURS["comedy"])
    dashed_arrow(plot, comedy, total.tolist(), COLOURS["horror"])
    tag(plot, comedy, book.liked[0], (-24, -9))
    middle = np.add(comedy, np.array(horror) / 2)
    tag(plot, middle, book.liked[1], (4, 0), ha="left")
    tag(plot, total.tolist(), " + ".join(book.liked), (0, 9))
    shifts = [(4, -16), (-4, 16), (-46, 2)]
    films = zip(book.film_names[1:], book.film_table[1:], FILM_COLOURS, shifts)
    for name, film, colour, shift in films:
        product = (total @ film).item()
        arrow(plot, (0, 0), film.tolist(), colour, width=2.8)
        tag(plot, film.tolist(), f"{name}\n{number(round(product, 3))}", shift, weight="bold")
    arrow(plot, (0, 0), total.tolist(), INK)  # last, so that it lies on Zombie Picnic's
    label(ax, 164, 12, f"numbers: dot product with {' + '.join(book.liked)}")
    return ax


def interactions(book):
    """The dot products of the four vectors that are kept: each pair once."""
    ax = canvas(277, 210, "Film and genres go together best")
    width, height, left, top = 50, 38, 70, 160
    largest = max(book.products[pair] for pair in book.kept)
    for j, name in enumerate(NAMES):
        y = top - height * (j + 0.5)
        label(ax, left + width * (j + 0.5), top + 12, name, TEXT)
        label(ax, 35, y + 7, name, TEXT)
        label(ax, 35, y - 8, vector(book.vectors[j]))
        cells(ax, left, y, width, height, [""] * 4, ["other"] * 4, strength=0)
        for k in range(j):
            value = book.products[j, k]
            strength = 0.8 * (value / largest).item() ** 2  # squared: the largest jumps out
            place = left + width * (k + 0.5), y, width, height
            box(ax, *place, hundredths(value), "interaction", "", strength, line=2.2)
    return ax


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
    tag(plot, (logit, 0), f"{logit:.3f}", (4, 8), ha="left")
    tag(plot, (-5, probability), f"{probability:.3f}", (4, 8), ha="left")
    tag(plot, (logit, probability), "Mira", (8, -8), ha="left", weight="bold")


def loss_curves(ax, book):
    """The right half: the log loss if she clicks, and if she does not."""
    settings = {"xlim": (0, 1), "ylim": (0, 3.5), "xticks": [0, 0.5, 1], "yticks": [0, 1, 2, 3]}
    plot = panel(ax, 262, 36, 178, 136, **settings)
    label(ax, 244, 182, "log loss", ha="left")
    label(ax, 351, 11, "probability")
    chances = np.linspace(0.001, 0.999, 500)
    plot.plot(chances, -np.log(chances), color=INK, linewidth=1.6)
    plot.plot(chances, -np.log(1 - chances), color=INK, linewidth=1.6, linestyle="--")
    tag(plot, (np.exp(-3), 3), "if she clicks", (7, 0), ha="left")
    tag(plot, (1 - np.exp(-3), 3), "if she doesn't", (-7, 0), ha="right")
    chance = book.probability
    plot.plot([chance, chance], [0, book.loss_no_click], **GUIDE)
    plot.plot(chance, book.loss_click, **MARK)
    plot.plot(chance, book.loss_no_click, markerfacecolor="white", **MARK)
    tag(plot, (chance, book.loss_click), f"{book.loss_click:.3f}", (4, 9), ha="left")
    tag(plot, (chance, book.loss_no_click), f"{book.loss_no_click:.3f}", (-7, 6), ha="right")


def gradient(book):
    """The genre table and the gradient of its rows: only those of her bag are lit."""
    ax, height = canvas(271, 160, "Only looked-up rows get a gradient"), 24
    for x, heading in [(124, "genre table"), (220, "gradient")]:
        label(ax, x, 122, heading, TEXT, weight="bold")
    rows = zip(book.genre_names, book.genre_table, book.gradients[0])
    for place, (name, vector_of_it, slope) in enumerate(rows):
        y = 96 - height * place
        lit = place in book.liked_ids
        kinds = ["embedding" if lit else "other"] * 2
        label(ax, 82, y, f"{name}  {place}", ha="right", weight="bold" if lit else "normal")
        cells(ax, 90, y, 34, height, map(number, vector_of_it), kinds)
        cells(ax, 174, y, 46, height, map(thousandths, slope), kinds)
    return ax


def sizes(book):
    """The parameters of the paper's model as two areas: the tables, and all else."""
    with torch.device("meta"):  # shapes without memory
        kaggle = book.DLRM(dlrm_utils.CRITEO_KAGGLE_TABLE_SIZES, 16, [512, 256, 64], [512, 256])
    in_tables = sum(table.weight.numel() for table in kaggle.tables)
    others = sum(parameter.numel() for parameter in kaggle.parameters()) - in_tables
    ax = canvas(361, 190, f"For each number in the MLPs, {in_tables / others:,.0f} in the tables")
    width, height = 345, 130
    small = (width * height * others / in_tables) ** 0.5
    box(ax, 180.5, 99, width, height, f"{in_tables:,}", "embedding", "in the tables")
    box(ax, 8 + small / 2, 16, small, small, "", "dense", strength=1)
    label(ax, 20, 16, f"{others:,} in both MLPs", ha="left")
    label(ax, 353, 16, "areas to scale", ha="right")
    return ax


def funnel(book):
    """From millions of films to the ten that are shown."""
    ax = canvas(361, 172, "First cut cheaply, then rank with care")
    stages = [(40, 108, "millions"), (188, 58, "hundreds"), (321, 26, "ten")]
    for x, height, name in stages:
        box(ax, x, 88, 64, height, name, "other", strength=0.25)
    jobs = [("retrieval", "popularity, or one\ndot product a film", "other")]
    jobs += [("ranking", "DLRM scores\neach of them", "interaction")]
    for (name, way, kind), (left, high, _), (right, low, _) in zip(jobs, stages, stages[1:]):
        trapezoid(ax, left + 35, right - 35, 88, high, low, kind)
        label(ax, (left + right) / 2, 88, name, TEXT, weight="bold")
        label(ax, (left + right) / 2, 18, way)
    return ax


def step(book):
    """One step of SGD, seen from near: the film that she clicked moves towards what she likes."""
    zoom = {"low": (0.7, 0.7), "high": (1.05, 1.05), "unit": 700, "ticks": (0.7, 0.8, 0.9, 1)}
    ax, plot = funny_scary_plane("Her click pulls the film towards Mira", **zoom)
    before = book.film_table[book.film_id]
    after = before - STEP_RATE * book.gradients[1][book.film_id]
    likes = book.vectors[NAMES.index("liked")].tolist()
    (x, y), (right, up) = after.tolist(), (after - before).tolist()
    plot.plot([before[0], x, x], [before[1], before[1], y], **GUIDE)
    tag(plot, (x - right / 2, before[1]), f"{right:.3f}", (0, -8))
    tag(plot, (x, y - up / 2), f"{up:.3f}", (4, 0), ha="left")
    dashed_arrow(plot, after.tolist(), likes, INK)
    tag(plot, likes, "what Mira likes", (0, 9))
    arrow(plot, zoom["low"], before.tolist(), COLOURS["both"], width=2.8)
    arrow(plot, before.tolist(), after.tolist(), COLOURS["interaction"], width=2.8)
    texts = [f"{name}\n{vector(x)}" for name, x in [(book.film, before), ("after a step", after)]]
    tag(plot, before.tolist(), texts[0], (10, -32), ha="left", weight="bold")
    tag(plot, after.tolist(), texts[1], (-10, 4), ha="right", weight="bold")
    label(ax, 164, 12, "a little more up than right, because it's evening")
    return ax


def auc(book):
    """Six impressions on a line by prediction; the pairs in the wrong order are joined."""
    labels, predictions = book.six_labels, book.six_predictions
    clicks, others = predictions[labels == 1], predictions[labels == 0]
    wrong = [(click, other) for click in clicks for other in others if click < other]
    pairs = len(clicks) * len(others)
    right = pairs - len(wrong)
    ax = canvas(413, 158, f"{right} of {pairs} pairs in the right order: AUC {right / pairs:.2f}")
    left, length, line, up, down = 68, 320, 76, 100, 52
    axis = panel(ax, left, line, length, 1, xlim=(0, 1), xticks=[0, 0.5, 1], yticks=[])
    axis.spines["left"].set_visible(False)
    label(ax, left + 0.87 * length, line - 10, "prediction")
    rows = [(up, 15, "click", clicks), (down, -15, "no click", others)]
    for y, shift, name, values in rows:
        label(ax, 56, y, name, TEXT, ha="right")
        for value in values:
            dot(ax, left + length * value, y, filled=name == "click")
            label(ax, left + length * value, y + shift, number(value))
    for click, other in wrong:
        start, end = (left + length * click, up), (left + length * other, down)
        ax.plot(*zip(start, end), color=INK, linewidth=2)
        text = f"the wrong pair: no click at {number(other)}, click at {number(click)}"
        label(ax, left + length * (click + other) / 2, 14, text, weight="bold")
    return ax


def split(book):
    """The parts of Criteo's file, from its first line to its last."""
    ax = canvas(400, 158, "Train on the past, test on the future")
    end = CRITEO_EXAMPLES
    start = -(-6 * end // 7)
    middle = (start + end + 1) // 2
    left, block, y = 10, 380 / 7, 76
    train, edge = left + 6 * block, left + 6.5 * block
    cells(ax, left, y, block, 32, [""] * 6, ["other"] * 6, strength=0.25)
    cells(ax, train, y, block / 2, 32, [""], ["other"], strength=1)
    cells(ax, edge, y, block / 2, 32, [""], ["other"], strength=0)
    bracket(ax, left, train - 2, 102)
    label(ax, (left + train) / 2, 112, f"train: {start:,}", TEXT, weight="bold")
    bracket(ax, train + 1, edge - 1, 102)
    label(ax, train + 1, 112, f"test\n{middle - start:,}", above=True, ha="left")
    label(ax, 390, 50, f"validation: {end - middle:,}", ha="right")
    arrow(ax, (left, 24), (390, 24))
    label(ax, left, 12, f"order in Criteo's file, {end:,} examples", ha="left")
    return ax


def butterfly(book):
    """What four ranks have before and after the shuffle; the shade is that of the tables' rank."""
    ax = canvas(400, 206, "The shuffle gives every rank all tables")
    grid = [[(sender, receiver) for receiver in range(4)] for sender in range(4)]
    halves = [(48, "before", "own tables, all examples", grid)]
    halves += [(240, "after", "all tables, own examples", book.butterfly(grid))]
    width, height, shades = 38, 28, [0.08, 0.36, 0.68, 1]
    for left, when, content, blocks in halves:
        middle = left + 2 * width
        label(ax, middle, 174, when, TEXT, weight="bold")
        label(ax, middle, 160, content)
        for rank, row_of_blocks in enumerate(blocks):
            y = 136 - height * rank
            for place, (sender, receiver) in enumerate(row_of_blocks):
                x, text = left + width * (place + 0.5), f"{sender}→{receiver}"
                box(ax, x, y, width, height, text, "embedding", strength=shades[sender])
    for rank in range(4):
        label(ax, 42, 136 - height * rank, f"rank {rank}", ha="right")
    arrow(ax, (206, 94), (234, 94), width=2)
    label(ax, 200, 16, "0→1: from the tables of rank 0, for the examples of rank 1")
    return ax


def beside(book):
    """One liked film beside four drawn ones: drawn evenly, and as often as they are liked."""
    ax = canvas(413, 212, "Drawn evenly, fame decides. Drawn by likes, taste does.")
    label(ax, 150, 178, "liked: click", TEXT, weight="bold")
    label(ax, 310, 178, "drawn: no click", TEXT, weight="bold")
    rows = [
        ("drawn evenly", [12, 7, 31, 9]),
        ("drawn as often\nas people like them", [210, 95, 150, 60]),
    ]
    for y, (name, drawn) in zip((132, 58), rows):
        label(ax, 8, y, name, ha="left")
        for x, likes in zip((150, 232, 284, 336, 388), (180, *drawn)):
            fill = tint("interaction" if x == 150 else "other", 0.5)
            ax.add_patch(Circle((x, y), 1.7 * likes**0.5, facecolor=fill))
            label(ax, x, y, likes)
    label(ax, 206, 11, "number and area: how many people like the film")
    return ax


def live_mira(book):
    """Stands in for section 7's live picture where nothing moves: her inputs and the ranking."""
    ax = canvas(413, 150, "On the page, you move her inputs")
    for place, genre in enumerate(book.genre_names[1:]):
        tick(ax, 16 + 70 * place, 112, genre, genre in book.liked)
    for y, meaning, value in zip((84, 56), DENSE_MEANINGS, book.dense_row):
        slider(ax, 16, y, meaning, value / 20)
    tick(ax, 16, 26, book.hour_names[1], book.hour == book.hour_names[1])
    tick(ax, 86, 26, book.hour_names[2], book.hour == book.hour_names[2])
    ranked = sorted(book.chances.items(), key=lambda film: -film[1])
    for place, (name, chance) in enumerate(ranked):
        y, colour = 106 - 36 * place, FILM_COLOURS[book.film_names.index(name) - 1]
        label(ax, 258, y + 8, f"{place + 1}. {name} {chance:.3f}", ha="left")
        ax.plot([258, 258 + 140 * chance], [y - 6] * 2, color=colour, linewidth=5)
    return ax


def live_world(book):
    """Stands in for section 8's live picture: films on their way from random places to theirs."""
    ax = canvas(413, 214, "On the page, you train it: twelve films walk to their places")
    plot = panel(ax, 16, 16, 180, 170, xlim=(-1.2, 1.3), ylim=(-1.05, 1.3), xticks=[], yticks=[])
    plot.axis("off")
    plot.axhline(0, color=FAINT, zorder=0)
    plot.axvline(0, color=FAINT, zorder=0)
    tag(plot, (1.1, 0), "funny", (0, 7))
    tag(plot, (0, 1.2), "scary", (18, 0))
    chance = np.random.default_rng(0)
    corners = [((0.9, -0.5), "comedy"), ((-0.5, 0.9), "horror"), ((0.8, 0.8), "both")]
    for corner, kind in [*corners, ((-0.5, -0.5), "other")]:
        for goal in corner + chance.normal(0, 0.15, (3, 2)):
            start = chance.uniform(-0.4, 0.4, 2)
            now = start + 0.75 * (goal - start)
            plot.plot(*zip(start, now), color=COLOURS[kind], linewidth=1)
            plot.plot(*now, "o", color=COLOURS[kind], markersize=6)
            plot.plot(*goal, "o", color=COLOURS[kind], markersize=11, fillstyle="none")
    slider(ax, 222, 160, "training", 1)
    slider(ax, 222, 132, "learning rate", 1 / 3)
    rounded(ax, 252, 96, 60, 26, "Train", "other")
    rounded(ax, 350, 96, 118, 26, "Again, other seed", "other")
    label(ax, 222, 58, "dot: where the model has the film\nring: where it truly is", ha="left")
    return ax


def live_people(book):
    """Stands in for section 10's live picture: what one ticks, the knob, and room for ten films."""
    ax = canvas(413, 170, "On the page, you tick films, and ten others come back")
    for place, film in enumerate(["Star Wars", "Alien", "Titanic", "Toy Story"]):
        tick(ax, 16, 132 - 24 * place, film, place < 2)
    slider(ax, 16, 26, "popularity", 0.5)
    for place in range(10):
        x, y = 244 + 88 * (place // 5), 132 - 24 * (place % 5)
        label(ax, x, y, f"{place + 1}.", ha="right")
        box(ax, x + 36, y, 60, 9, "", "interaction", strength=0.9 - 0.07 * place)
    arrow(ax, (194, 84), (222, 84))
    return ax


FIGURES = [architecture, row, plane, lookup, offsets, bottom_mlp, additive, plane_sum, interactions]
FIGURES += [curves, gradient, sizes, funnel, step, auc, beside, split, butterfly]
FIGURES += [live_mira, live_world, live_people]


def draw_all(book, folder):
    """Write every figure into `folder`, as NAME.svg."""
    example = worked_example(book)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the notebook's plots have
        matplotlib.rcParams.update(SVG)
        for draw in FIGURES:
            save(draw(example), Path(folder) / f"{draw.__name__}.svg")


def draw_computation(book, path):
    """Write torchviz's graph of Mira's logit, as appendix A shows it."""
    logit = book.hand_model(book.her_dense, book.her_indices, book.her_offsets)
    parameters = dict(book.hand_model.named_parameters())
    draw_graph(torchviz.make_dot(logit, params=parameters), path)


if __name__ == "__main__":
    notebook = dlrm_models.load_notebook()
    draw_all(notebook, HERE)
    draw_computation(notebook, HERE / "dlrm_graph.svg")
