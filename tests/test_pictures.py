"""The notebook's plots: each shows its data under its message, and its texts keep apart."""

import html
import itertools

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.quiver import Quiver
from nbconvert import HTMLExporter

import dlrm_utils
from budgets import ROOT, code_cells, read_notebook
from figures import live, pictures, shapes

KINDS = ["comedy", "horror", "both", "other"] * 3
NAMES = [f"Film {k}" for k in range(12)]
random = np.random.default_rng(0)
CENTRES = np.array([(0.9, -0.5), (-0.5, 0.9), (0.8, 0.8), (-0.5, -0.5)] * 3)
TRUTH = CENTRES + random.normal(0, 0.1, (12, 2))
PANELS = {"before": random.normal(0, 0.3, (12, 2)), "after": TRUTH + 0.05}
RUNS = pd.DataFrame(
    {
        "optimizer": np.repeat(["Adagrad", "SGD"], 9),
        "model": ["DLRM", "DCN", "plain MLP"] * 6,
        "log_loss": [0.42, 0.40, 0.41] * 3 + [0.37, 0.39, 0.45] * 3,
    }
)
CURVES = pd.DataFrame(
    {"DLRM": [0.6, 0.5, 0.41], "DCN": [0.6, 0.55, 0.42], "truth": [0.4, 0.4, 0.4]}, [1, 2, 3]
)
PATHS = {
    "explore": pd.DataFrame({"clicks": [0, -0.3, -0.8], "kinds": [0, 0.6, 1.2]}, [0, 0.2, 0.4]),
    "re-rank": pd.DataFrame({"clicks": [0, -0.1, -0.5], "kinds": [0, 1.5, 3.2]}, [0, 1, 2]),
}
TRADE = {
    "title": "a viewer", "x": "clicks", "y": "kinds", "xlabel": "clicks", "ylabel": "kinds",
    "paths": PATHS, "better": "upper right",
}  # fmt: skip
CHANCES = random.random(500)
CALLS = {
    "planes": [PANELS, TRUTH, KINDS, NAMES],
    "calibration": [np.arange(1000) % 7 < 3, np.linspace(0.01, 0.99, 1000) ** 2],
    "against_truth": [{"logistic regression": CHANCES / 2, "DLRM": CHANCES}, CHANCES],
    "bars": [{"DLRM": 3.7, "popularity": 2.6, "EASE": 4.4}, "liked of ten",
             {"DLRM": 0.2, "EASE": 0.3}, ("popularity", 2.6)],
    "race": [RUNS, 0.35],
    "lines": [{"Adagrad": CURVES, "SGD": CURVES + 0.01}, "examples", "log loss"],
    "trade": [[TRADE]],
}  # fmt: skip


@pytest.fixture(params=CALLS)
def drawn(request):
    """The plot's name, its figure as drawn, and the axes."""
    with matplotlib.rc_context({"figure.dpi": 100}):
        getattr(pictures, request.param)("A message that is true", *CALLS[request.param])
        figure = plt.gcf()
        figure.draw_without_rendering()
        yield request.param, figure, figure.axes
        plt.close(figure)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_title_is_the_message(drawn):
    assert drawn[1].get_suptitle() == "A message that is true"


def test_no_text_is_cut_or_covers_another(drawn):
    _, figure, axes = drawn
    written = [*figure.texts]
    for ax in axes:
        written += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
    boxes = [(text, text.get_window_extent().padded(-1.5)) for text in written if text.get_text()]
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2, text
    for (one, box), (two, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (one, two)


def test_it_shows_what_it_is_given(drawn):
    name, _, axes = drawn
    shows = globals()[f"shows_{name}"]
    shows(axes)


def shows_planes(axes):
    for ax, (title, points) in zip(axes, PANELS.items(), strict=True):
        (arrows,) = ax.findobj(Quiver)
        assert ax.get_title() == title
        assert np.allclose(np.c_[arrows.U, arrows.V], points) and not arrows.XY.any()
        assert {"Film 0", "Film 1", "Film 2", "Film 10"} <= {*texts(ax)}
        assert "Film 3" not in texts(ax)
    rings = [c for c in axes[-1].collections if not isinstance(c, Quiver)][0]
    assert np.allclose(rings.get_offsets(), TRUTH)
    assert sorted(text for text in texts(axes[-1]) if text in KINDS) == sorted(KINDS[:4])
    assert {"funny", "scary"} <= {*texts(axes[-1])} and "funny" not in texts(axes[0])


def shows_calibration(axes):
    labels, predictions = (part.reshape(10, 100) for part in CALLS["calibration"])  # ten tenths
    clicked, predicted, rows = labels.mean(1), predictions.mean(1), 100
    points, bars = axes[0].lines[1], axes[0].collections[0]
    assert np.allclose(points.get_xydata(), np.c_[predicted, clicked])
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert np.allclose(lengths, 4 * np.sqrt(clicked * (1 - clicked) / rows))


def shows_against_truth(axes):
    for ax, (name, predictions) in zip(axes, CALLS["against_truth"][0].items(), strict=True):
        (cells,) = ax.collections
        assert ax.get_title() == name
        places = np.repeat(cells.get_offsets(), cells.get_array().astype(int), axis=0)
        assert len(places) == 500
        assert np.allclose(places.mean(0), [CHANCES.mean(), predictions.mean()], atol=0.02)


def shows_bars(axes):
    (ax,) = axes
    widths = [patch.get_width() for patch in ax.patches]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert dict(zip(names, widths)) == CALLS["bars"][0]
    assert widths == sorted(widths)  # from below
    green = [name for name, patch in zip(names, ax.patches) if is_green(patch.get_facecolor())]
    assert green == ["DLRM"]
    assert {" 3.7", " 2.6", " 4.4"} <= {*texts(ax)}
    assert ax.get_title() == "popularity 2.6"
    assert any(set(line.get_xdata()) == {2.6} for line in ax.lines)


def shows_race(axes):
    orders = {ax.get_title(): [label.get_text() for label in ax.get_yticklabels()] for ax in axes}
    assert orders == {"Adagrad": ["DLRM", "plain MLP", "DCN"], "SGD": ["plain MLP", "DCN", "DLRM"]}
    for ax in axes:
        runs = RUNS[RUNS["optimizer"] == ax.get_title()]
        *dots, means = ax.lines
        for line, name in zip(dots, orders[ax.get_title()], strict=True):
            losses = runs.loc[runs["model"] == name, "log_loss"] - 0.35
            assert np.allclose(line.get_xdata(), losses)
            assert is_green(line.get_color()) == (name == "DLRM")
        assert len(means.get_xdata()) == 3


def shows_lines(axes):
    for ax, (title, table) in zip(axes, CALLS["lines"][0].items(), strict=True):
        assert ax.get_title() == title
        for line, text, (name, numbers) in zip(ax.lines, ax.texts, table.items(), strict=True):
            assert np.allclose(line.get_ydata(), numbers)
            assert text.get_text() == name and text.xy == (3, numbers.iloc[-1])
            assert text.get_color() == line.get_color()
            assert is_green(line.get_color()) == (name == "DLRM")


def shows_trade(axes):
    (ax,) = axes
    thick = [line for line in ax.lines if line.get_linewidth() == 2]
    for line, path in zip(thick, PATHS.values(), strict=True):
        assert np.allclose(line.get_xydata(), path)
    assert sorted(texts(ax)) == sorted(
        ["0", "0.2", "0.4", "1", "2", "explore", "re-rank", "better"]
    )
    better = ax.texts[texts(ax).index("better")]
    assert min(better.xy) > 0.5  # in shares of the axes: up and right


def is_green(colour):
    return matplotlib.colors.to_hex(colour) == pictures.COLOURS["interaction"]


def test_runs_of_a_trade_are_thin_lines_around_their_mean():
    columns = pd.MultiIndex.from_product([["clicks", "kinds"], [0, 1]])
    runs = pd.DataFrame([[0, 0, 0, 0], [-1, -3, 2, 4]], [0, 1], columns)
    pictures.trade("message", [TRADE | {"paths": {"explore": runs}}])
    *thin, mean = plt.gca().lines
    assert np.allclose(mean.get_xydata(), [[0, 0], [-2, 3]])
    assert [list(line.get_xdata()) for line in thin] == [[0, -1], [0, -3]]
    plt.close()


def test_drawings_and_plots_have_the_same_colours_and_the_notebook_types_none():
    assert pictures.COLOURS is shapes.COLOURS
    code = "\n".join(cell["source"] for cell in code_cells(read_notebook()))
    assert "rcParams" not in code and "COLOURS = {" not in code


def test_every_plot_says_in_words_what_it_shows():
    for cell in code_cells(read_notebook()):
        plots = [out for out in cell["outputs"] if "image/png" in out.get("data", {})]
        if plots or "pictures." in cell["source"]:
            alt = cell["metadata"].get("alt", "")
            assert len(alt.split()) >= 8, f"{cell['id']} needs an alternative text in its metadata"


def test_the_page_gives_a_plot_its_words():
    image = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    alt = 'Two lines: "up", and down'
    cell = nbformat.v4.new_code_cell('f(title="wrong")', outputs=[image], metadata={"alt": alt})
    exporter = HTMLExporter(extra_template_basedirs=[str(ROOT / "figures")], template_name="page")
    page = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]
    assert f'alt="{alt}"' in html.unescape(page) or f"alt='{alt}'" in html.unescape(page)


# ---- What the live pictures are given --------------------------------------------------------


@pytest.fixture
def given(monkeypatch):
    """The pictures' numbers in place of their HTML."""
    monkeypatch.setattr(live, "picture", lambda name, **numbers: numbers)


def test_the_rule_of_the_live_world_is_the_one_that_section_8_writes_down(notebook, given):
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(rows, 2)) for rows in (301, 13, 3)]
    model = notebook.DLRM([301, 13, 3], 2, [8], [32], num_dense=2)
    numbers = live.world({0: model}, {0: None}, {0: hidden[1]}, hidden, [], [], [])
    rule = notebook.DLRM([301, 13, 3], 2, [], [], num_dense=2)
    state = {name: torch.as_tensor(values) for name, values in numbers["truth"].items()}
    rule.load_state_dict(state)
    ids = [rng.integers(1, rows, 100) for rows in (301, 13, 3)]
    dense = np.log1p(rng.poisson(3, (100, 2)))
    viewer, film, hour = (vectors[places] for vectors, places in zip(hidden, ids))
    logit = -1 + 2 * ((viewer + hour) * film).sum(1) + dense @ [0.5, -0.5]
    by_rule = rule(*dlrm_utils.one_id_each(dense, ids)[:3])
    assert np.allclose(by_rule.detach(), logit, atol=1e-4)
    assert torch.equal(numbers["stages"][0]["weights"]["top.0.bias"], model.top[0].bias)


def test_the_films_to_tick_carry_their_own_ids_and_likes(notebook, given):
    titles = [f"film {k}" for k in range(30)]
    films = pd.DataFrame({"title": titles, "year": range(1960, 1990), "likes": range(40, 10, -1)})
    films["genres"] = [["a"], ["b", "a"], ["c"]] * 10
    asked = films.assign(liked=[[title] for title in reversed(titles)])
    columns = {"dense": ["year"], "categorical": ["title"], "multi_hot": ["genres", "liked"]}
    encoder = dlrm_utils.FrameEncoder(**columns).fit(asked)
    model = notebook.DLRM(encoder.table_sizes, 4, [], [], num_dense=1)
    rows = live.people(model, encoder, films, most=20)["films"]
    assert [row[0] for row in rows] == titles[:20]
    batch = encoder.transform(films.assign(liked=[[title] for title in titles]))
    for k, (_, liked, (own, genres), dense, log_likes) in enumerate(rows):
        ids = [torch.tensor(own), torch.tensor(genres), torch.tensor([liked])]
        alone = model(torch.tensor([dense]).reshape(1, 1), ids, [torch.tensor([0])] * 3)
        assert torch.allclose(alone, model(*batch.take([k])[:3]))
        assert log_likes == pytest.approx(np.log(films["likes"][k]))
