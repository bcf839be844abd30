"""The shapes that the drawings are made of: boxes, arrows, labels, axes in a drawing, and graphs.

All lengths are in points, like the type sizes.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

TEXT, SMALL = 11, 9  # the two type sizes
INK, FAINT = "#1a202c", "#cbd5e0"
COLOURS = {  # as the notebook types them for its plots; a test compares
    "dense": "#2b6cb0",
    "embedding": "#dd8a2e",
    "interaction": "#2f855a",
    "other": "#718096",
    "comedy": "#d4a017",
    "horror": "#6b46c1",
    "both": "#d53f8c",
}
PATCH = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}  # behind text
GUIDE = {"color": COLOURS["other"], "linewidth": 1, "linestyle": ":"}
MARK = {"marker": "o", "color": COLOURS["both"], "zorder": 3, "clip_on": False}
# How much of its colour a filled box takes. The fills also differ in lightness, so that they can
# be told apart in black and white.
STRENGTH = {"other": 0.08, "dense": 0.22, "embedding": 0.55, "interaction": 0.60}
# Text as paths looks the same without the font; a fixed salt makes the ids in a file the same in
# every run.
SVG = {"svg.fonttype": "path", "svg.hashsalt": "DLRM", "font.family": "DejaVu Sans"}


def number(value):
    """A number as it was typed, with a true minus sign: 3 for 3.0."""
    return f"{value + 0.0:g}".replace("-", "−")  # + 0.0: no minus before a zero


def thousandths(value):
    """At most three decimals: 1.386, 0.5, 0."""
    return number(round(float(value), 3))


def hundredths(value):
    """Two decimals, as in the boxes of the architecture."""
    return f"{value:.2f}".replace("-", "−")


def vector(values, form=hundredths):
    return "[" + ", ".join(map(form, values)) + "]"


def several(word, bag, between=", "):
    """'id 3' or 'ids 1, 2'."""
    return f"{word}{'s' * (len(bag) != 1)} {between.join(map(str, bag))}"


def widths(mlp):
    """The widths of an MLP's layers; every other layer is a ReLU, which changes no width."""
    return " → ".join(map(str, [mlp[0].in_features, *(layer.out_features for layer in mlp[::2])]))


def canvas(width, height, title):
    """An empty white drawing under its title, in points.

    Every width is that of the notebook's <img> over 1.55, so type is equally large in all figures.
    """
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white", layout="none")
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


def tag(plot, point, text, shift=(0, 0), **options):
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


def box(ax, x, y, width, height, text, kind, note="", strength=None, line=None, **style):
    """A value: filled, with corners."""
    line = line or (0.6 if kind == "other" else 1.0)
    fill = tint(kind, STRENGTH[kind] if strength is None else strength)
    style = {"facecolor": fill, "edgecolor": COLOURS[kind], "linewidth": line, **style}
    frame(ax, x, y, width, height, text, note, "square,pad=0", **style)


def rounded(ax, x, y, width, height, text, kind, note=""):
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


def trapezoid(ax, left, right, y, left_height, right_height, kind):
    """A funnel that lies on its side."""
    heights = np.array([left_height, right_height, -right_height, -left_height])
    corners = np.column_stack([[left, right, right, left], y + heights / 2])
    ax.add_patch(Polygon(corners, facecolor=tint(kind, 0.15), edgecolor="none"))


def dot(ax, x, y, filled):
    """One impression: filled, if it was clicked."""
    colour = COLOURS["interaction"]
    fill = colour if filled else "white"
    ax.add_patch(Circle((x, y), 6, facecolor=fill, edgecolor=colour, linewidth=2, zorder=3))


def arrow(ax, start, end, colour=COLOURS["other"], path="arc3", width=1.2):
    """A straight arrow, or one along another of matplotlib's paths."""
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


def tick(ax, x, y, text, ticked):
    """A box to tick, and its text."""
    fill = COLOURS["dense"] if ticked else "white"
    ax.add_patch(Rectangle((x - 5, y - 5), 10, 10, facecolor=fill, edgecolor=COLOURS["other"]))
    label(ax, x + 11, y, text, ha="left")


def slider(ax, x, y, text, share):
    """A text, and right of it a line with a knob at `share` of the way."""
    label(ax, x - 5, y, text, ha="left")
    ax.plot([x + 112, x + 172], [y, y], color=COLOURS["dense"], linewidth=3)
    ax.plot(x + 112 + 60 * share, y, "o", color=COLOURS["dense"], markersize=9)


def bracket(ax, left, right, y):
    """A horizontal bracket, open below."""
    ys = [y - 4, y, y, y - 4]
    ax.plot([left, left, right, right], ys, color=COLOURS["other"], linewidth=1)


def funny_scary_plane(title, low=(-0.75, -0.7), high=(1.3, 1.2), unit=125, ticks=(-0.5, 0, 0.5, 1)):
    """A drawing and in it the axes of the plane, from `low` to `high`, `unit` points a unit."""
    width, height = unit * np.subtract(high, low)
    ax = canvas(297, height + 98.5, title)
    limits = {"xlim": (low[0], high[0]), "ylim": (low[1], high[1])}
    plot = panel(ax, 36, 58, width, height, xticks=ticks, yticks=ticks, **limits)
    label(ax, 164, 35, "funny", TEXT)
    label(ax, 8, height + 65.5, "scary", TEXT, ha="left")
    for line in (plot.axhline, plot.axvline):
        line(0, color=FAINT, linewidth=0.8, zorder=0)
    return ax, plot


def connection(ax, start, end, weight, share):
    """A line between two units, none for a weight of 0; the weight stands at `share` of the way."""
    if not weight:
        return
    ends = zip(start, end, strict=True)
    ax.plot(*ends, color=COLOURS["dense"], linewidth=1.6, zorder=1.5)
    x, y = ((1 - share) * a + share * b for a, b in zip(start, end, strict=True))
    label(ax, x, y, number(weight), bbox=PATCH, zorder=2)


def circle(ax, x, y, text, kind):
    """A unit of a network: a circle with its number, over the lines that end in it."""
    style = {"facecolor": tint(kind, STRENGTH[kind]), "edgecolor": COLOURS[kind], "zorder": 3}
    ax.add_patch(Circle((x, y), 20, **style))
    label(ax, x, y, text, TEXT, zorder=4)


def save(ax, path):
    """Write a drawing as SVG, without date and version: the same drawing has the same bytes."""
    ax.figure.savefig(path, metadata={"Date": None, "Creator": None})


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
