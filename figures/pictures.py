"""The plots that cells show.

Importing it sets matplotlib's style. A plot's title is its message. Jupyter shows a plot when its
cell ends, so none is returned.
"""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.calibration import calibration_curve

from figures.shapes import COLOURS, FAINT, INK, draw_graph  # noqa: F401 (for cells)

GREEN, GREY = COLOURS["interaction"], COLOURS["other"]  # models are green
RIVALS = [("#4a5568", "--"), ("#7f8ca1", "-."), ("#1a202c", ":"), ("#626f85", (0, (4, 1, 1, 1)))]
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
AROUND = [(far * x, far * y) for far in (6, 14, 22, 32) for x, y in SIDES]  # in points
UPWARDS = [(6, 3 * k) for k in range(20)]
NEAR = {"xytext": (0, 0), "textcoords": "offset points"}  # of a text that `_spread` will move
plt.rcParams |= {"figure.dpi": 144, "figure.constrained_layout.use": True, "font.size": 11}
plt.rcParams |= {"axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}


def _panels(title, names, size, rows=1, **axis):
    """Plots side by side under the message, each with its own name."""
    figure, axes = plt.subplots(rows, -(-len(names) // rows), figsize=size, squeeze=False, **axis)
    figure.suptitle(title, weight="bold")
    for ax, name in zip(axes.flat, names):
        ax.set_title(name)
    return axes.ravel()


def _spread(ax, spots, points=()):
    """Move each text to the spot near its place where it covers least; points: in pixels."""
    taken = []
    for text in ax.texts:
        text.set_in_layout(spots is UPWARDS)  # names beyond the axes need room, others take none
    ax.figure.draw_without_rendering()  # from now on sizes are known

    def covered(text, spot):
        side, height = np.sign(spot).astype(int) if spots is AROUND else (1, 0)
        text.set(ha=["center", "left", "right"][side], va=["center", "bottom", "top"][height])
        text.set_position(spot)
        box = text.get_window_extent()
        outside = spots is AROUND and ax.bbox.count_contains(box.corners()) < 4
        texts = sum(map(box.overlaps, taken)) + outside
        return 200 * texts + 5 * box.count_contains(points) + np.hypot(*spot)

    for text in sorted(ax.texts, key=lambda text: text.xy[1]) if spots is UPWARDS else ax.texts:
        covered(text, min(spots, key=lambda spot: covered(text, spot)))
        taken.append(text.get_window_extent())


def planes(title, panels, truth, kinds, names):
    """Films as arrows from 0, one plane a panel; in the last one faint rings show the truth.

    panels: title -> (12, 2); truth: (12, 2); kinds: 12; names: 12, of which four are written.
    """
    colours = [COLOURS[kind] for kind in kinds]
    arrows = {"color": colours, "angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012}
    axes = _panels(title, panels, (9.2, 3.7))
    for ax, points in zip(axes, map(np.asarray, panels.values())):
        edge = 1.5 * np.abs(points).max()
        ax.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
        ax.axis("off")
        ax.plot([-edge, edge], [0, 0], [0, 0], [-edge, edge], color=FAINT, zorder=0)
        ax.quiver(*np.zeros_like(points.T), *points.T, **arrows)
        ends = [points * share for share in np.linspace(0, 1.05, 40)]
        for film in (0, 1, 2, 10):  # Mira's three, and one more that is both
            ax.annotate(names[film], points[film], size=9, color=colours[film], **NEAR)
        if ax is axes[-1]:
            ax.scatter(*truth.T, s=90, facecolors="none", edgecolors=colours, alpha=0.5)
            ends += [truth - 0.05, truth + 0.05]
            ax.annotate("funny", (0.75 * edge, 0), **NEAR)
            ax.annotate("scary", (0, 0.92 * edge), **NEAR)
            for kind in dict.fromkeys(kinds):
                middle = 1.5 * truth[np.array(kinds) == kind].mean(0)
                ax.annotate(kind, middle, weight="bold", color=COLOURS[kind], **NEAR)
        _spread(ax, AROUND, ax.transData.transform(np.concatenate(ends)))


def calibration(title, labels, predictions, groups=10):
    """What was promised and what came, in equal groups by prediction; bars of two errors."""
    curve = {"n_bins": groups, "strategy": "quantile"}
    clicked, predicted = calibration_curve(labels, predictions, **curve)
    (ax,) = _panels(title, [""], (4.2, 4.2))
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1)
    errors = 2 * np.sqrt(clicked * (1 - clicked) / len(labels) * groups)
    ax.errorbar(predicted, clicked, errors, fmt="o", color=GREEN)
    ax.set(xlabel="mean prediction", ylabel="share of clicks", aspect="equal")


def against_truth(title, panels, truth):
    """Each model's predictions over the true probabilities; panels: name -> predictions."""
    for ax, predictions in zip(_panels(title, panels, (8, 3.8)), panels.values()):
        ax.hexbin(truth, predictions, gridsize=40, cmap="Greens", bins="log", extent=(0, 1, 0, 1))
        ax.plot([0, 1], [0, 1], color=INK, linewidth=1)
        ax.set(xlabel="true probability", ylabel="prediction", aspect="equal")


def bars(title, values, xlabel, errors=None, line=None, ours="DLRM"):
    """A bar a name, the longest on top, its number at its end; `ours` is green.

    values, errors: name -> number; line: (name, number) of an upright line.
    """
    values = pd.Series(values).sort_values()
    errors = pd.Series(errors, values.index, float).fillna(0)
    (ax,) = _panels(title, [""], (7, 0.9 + 0.42 * len(values)))
    colours = [GREEN if name == ours else GREY for name in values.index]
    ax.barh(values.index, values, xerr=errors, color=colours, height=0.7)
    for name, value in values.items():
        ax.annotate(f" {value:.3g}", (value + errors[name], name), va="center")
    if line:
        ax.axvline(line[1], color=INK, linestyle="--", linewidth=1)
        ax.set_title(f"{line[0]} {line[1]:.3g}", x=line[1], transform=ax.get_xaxis_transform())
    ax.set(xlabel=xlabel, xlim=(None, 1.12 * ax.get_xlim()[1]))


def race(title, runs, best, ours="DLRM"):
    """A dot a run, its log loss above the best possible; a panel an optimizer, best model on top.

    runs: DataFrame of optimizer, model and log_loss, a row a run.
    """
    groups = dict(list(runs.groupby("optimizer")))
    for ax, group in zip(_panels(title, groups, (9, 3), sharex=True), groups.values()):
        above = (group["log_loss"] - best).groupby(group["model"])
        means = above.mean().sort_values(ascending=False)
        for place, name in enumerate(means.index):
            dots, colour = above.get_group(name), GREEN if name == ours else GREY
            ax.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.6)
        ax.plot(means, range(len(means)), "|", color=INK, markersize=18)
        ax.set(xscale="log", xlabel="log loss above the best possible")
        ax.set_yticks(range(len(means)), means.index)
        ax.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()


def lines(title, tables, xlabel, ylabel, ours="DLRM", logx=False, sharey=True):
    """Lines, each named at its right end; `ours` is green, others are grey.

    tables: panel's name -> DataFrame, its index along x, a line a column.
    """
    rows = 1 + (len(tables) > 2)
    axes = _panels(title, tables, (8.5, 3.4 * rows), rows, sharex=True, sharey=sharey)
    for ax, table in zip(axes, tables.values()):
        rivals = cycle(RIVALS)
        for name, line in table.items():
            colour, dashes = (GREEN, "-") if name == ours else next(rivals)
            ax.plot(line := line.dropna(), color=colour, linestyle=dashes, linewidth=2)
            ax.annotate(name, (line.index[-1], line.iloc[-1]), color=colour, **NEAR)
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logx else "linear")
        if table.index.max() >= 10_000:
            ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,g}k")
    for ax in axes:
        _spread(ax, UPWARDS)


def trade(title, panels):
    """What each dose of a remedy gains and costs: a path a remedy, its doses at the dots.

    panels: dictionaries of title, xlabel, ylabel, x and y (columns), better ("upper right", say)
    and paths: remedy -> DataFrame, a dose a row; its columns (x, run) give a thin line a run.
    """
    for ax, panel in zip(_panels(title, [p["title"] for p in panels], (9, 4)), panels):
        doses = {}
        for (name, path), kind in zip(panel["paths"].items(), ("dense", "both", "interaction")):
            colour, runs = COLOURS[kind], [path[[panel[axis]]].to_numpy() for axis in "xy"]
            means = np.mean(runs, axis=2)  # (2, doses)
            ax.plot(*runs, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(*means, "o-", color=colour, linewidth=2)
            ax.annotate(name, means[:, -1], weight="bold", color=colour, **NEAR)
            doses |= {tuple(place): (dose, colour) for dose, place in zip(path.index, means.T)}
        for place, (dose, colour) in doses.items():  # where paths begin together, one number
            ax.annotate(dose, place, size=9, color=colour, **NEAR)
        place = 0.1 + 0.8 * ("right" in panel["better"]), 0.05 + 0.9 * ("upper" in panel["better"])
        ax.annotate("better", place, xycoords="axes fraction", weight="bold", **NEAR)
        ax.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        _spread(ax, AROUND, ax.transData.transform([*doses]))
