"""The page and its live pictures in a real browser: they count as PyTorch does, without a network.

Skipped where playwright or Chromium is missing.
"""

import itertools
import shutil
import time

import nbformat
import numpy as np
import pytest
import torch
from nbconvert import HTMLExporter
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import cross_val_predict
from torch.nn.functional import binary_cross_entropy_with_logits

from budgets import ROOT
from figures import live

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,  # starting a browser takes some seconds
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
KINDS = ["comedy", "horror", "both", "other"] * 3
CENTRES = {"comedy": (0.9, -0.5), "horror": (-0.5, 0.9), "both": (0.8, 0.8), "other": (-0.5, -0.5)}


def page_of(cells):
    """The page that `make run` would leave of these cells."""
    exporter = HTMLExporter(extra_template_basedirs=[str(ROOT / "figures")], template_name="page")
    return exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))[0]


def cell_with(html):
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    return nbformat.v4.new_code_cell("live(...)", outputs=[output])


def small_world():
    """The rule of a world as section 8's, as the state dict of a DLRM."""
    random = np.random.default_rng(0)
    films = np.array([(0, 0), *[CENTRES[kind] for kind in KINDS]])
    films[1:] += random.normal(0, 0.15, (12, 2))
    return {
        "tables.0.weight": random.normal(0, 1, (301, 2)),
        "tables.1.weight": films,
        "tables.2.weight": [[0, 0], [0.2, -0.2], [0.1, 0.4]],
        "bottom.0.weight": [[1, 0], [0, 1]],
        "bottom.0.bias": [0, 0],
        "top.0.weight": [[0.5, -0.5, 0, 0, 2, 0, 0, 2]],
        "top.0.bias": [-1],
    }


def film_model(notebook, **form):
    torch.manual_seed(0)
    return notebook.DLRM([301, 13, 3], 2, [8], [32], num_dense=2, **form)


@pytest.fixture(scope="module")
def pictures(notebook):
    """The pictures' HTML: Mira's films, a world to train in (twice), titles that look like code."""
    torch.manual_seed(0)
    people = notebook.DLRM([40, 5, 40], 4, [3], [8], num_dense=1)
    titles = [f"Film {k}" for k in range(1, 39)] + ['</script><b>"Amélie" & co']
    films = [
        [title, k + 1, [[k + 1], [1 + k % 4]], [k / 40 - 0.5], float(np.log(200 - 3 * k))]
        for k, title in enumerate(titles)
    ]
    hers = notebook.DLRM([4, 4, 3], embedding_dim=2, bottom_mlp=[3], top_mlp=[2], num_dense=2)
    names = notebook.genre_names, [1, 2], notebook.film_names, notebook.hour_names
    mira = live.mira(hers, *names)
    truth, weights = small_world(), film_model(notebook).state_dict()
    stages = [
        {"name": f"{seen:,} impressions", "seen": seen, "log_loss": loss, "weights": weights,
         "plane": share * truth["tables.1.weight"][1:]}
        for seen, loss, share in [(0, None, 0.02), (1_000, 0.68, 0.3), (50_000, 0.5, 0.9)]
    ]  # fmt: skip
    names = [f"A film with name {k}" for k in range(13)]
    world = live.picture("films", stages=stages, truth=truth, who="viewer", films=names,
                          hours=notebook.hour_names, kinds=["other", *KINDS])  # fmt: skip
    ticks = live.picture("people", weights=people.state_dict(), films=films)
    html = [picture.data for picture in (mira, world, ticks, world)]
    return {"hers": hers, "people": people, "films": films, "html": html}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    still = '<a id="one"></a>\n# A page\n<img src="figures/live_world.svg" alt="a still">'
    cells = [nbformat.v4.new_markdown_cell(still), *map(cell_with, pictures["html"])]
    path.write_text(page_of(cells), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def opened(browser, address):
    """The page in the browser, and every address that it asked for."""
    asked, errors = [], []
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page, asked, errors
    page.close()


@pytest.fixture
def fresh(browser, address):
    """The page as it is when it is opened."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(address)
    yield page
    page.close()


@pytest.fixture
def scripts(browser):
    """An empty page that knows what training.js and world.js define."""
    page = browser.new_page()
    for name in ("training.js", "world.js"):
        page.add_script_tag(path=ROOT / "figures" / name)
    yield page
    page.close()


def shown(form):
    """The numbers that a picture's ranking shows, by name."""
    rows = form.locator("li").all()
    values = [float(row.locator("data").first.get_attribute("value")) for row in rows]
    names = [row.inner_text().split(" · ")[0].rsplit(" ", 1)[0].strip() for row in rows]
    return dict(zip(names, values))


def seen(form):
    """How many impressions the page has trained on."""
    words = form.locator("[role=status]").inner_text().split()
    return int(words[1].replace(",", "")) if words[2] == "impressions." else 0


def wait_until_trained(page):
    button = "document.querySelectorAll('form')[1].train"
    page.wait_for_function(f"{button}.textContent == 'Train'", timeout=120_000)


def logit(model, dense, bags):
    """By PyTorch, from one example's bags."""
    indices, offsets = [torch.tensor(bag) for bag in bags], [torch.tensor([0])] * len(bags)
    return model(torch.as_tensor(dense)[None], indices, offsets).item()


def plain(state):
    return {name: torch.as_tensor(numbers).tolist() for name, numbers in state.items()}


def test_no_request_leaves_the_page(opened):
    _, asked, errors = opened
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    assert errors == []


def test_moved_inputs_give_pytorchs_probabilities(opened, pictures, notebook):
    form = opened[0].locator("form").first
    form.locator("[name=watched]").focus()
    for _ in range(4):  # from three films to seven, by the keyboard
        opened[0].keyboard.press("ArrowRight")
    form.get_by_label("comedy").uncheck()
    form.get_by_label("drama").check()
    form.get_by_label("morning").check()
    dense, found = torch.log1p(torch.tensor([7.0, 0.0])), shown(form)
    assert len(found) == 3
    for film, probability in found.items():
        bags = [[2, 3], [notebook.film_names.index(film)], [1]]
        expected = 1 / (1 + np.exp(-logit(pictures["hers"], dense, bags)))
        assert probability == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("knob", [0.0, 0.5, 1.0])
def test_ticked_films_and_the_knob_give_ten_others(fresh, pictures, knob):
    form = fresh.locator("form").nth(2)
    form.locator("[name=find]").fill("amé")
    assert form.locator("label:visible:has([type=checkbox])").count() == 1
    form.get_by_label("Amélie").check()
    form.locator("[name=find]").fill("")
    form.get_by_label("Film 7", exact=True).check()
    form.locator("[name=knob]").fill(str(knob))
    ticked = ['</script><b>"Amélie" & co', "Film 7"]
    liked = [film[1] for film in pictures["films"] if film[0] in ticked]
    scores = {
        title: logit(pictures["people"], dense, [*own, liked]) + knob * likes
        for title, _, own, dense, likes in pictures["films"]
        if title not in ticked
    }
    best = sorted(scores, key=scores.get, reverse=True)[:10]
    assert list(shown(form)) == best
    assert shown(form) == pytest.approx({title: scores[title] for title in best}, abs=5e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_three_hundred_steps_in_the_page_are_pytorchs(scripts, notebook, relu):
    model = film_model(notebook, relu_after_bottom=relu).double()
    start, optimizer = plain(model.state_dict()), torch.optim.Adagrad(model.parameters(), lr=0.1)
    batches = []
    for _ in range(300):
        dense = torch.log1p(torch.poisson(torch.tensor([3.0, 1.0]).expand(64, 2)).double())
        ids = torch.stack([torch.randint(1, size, (64,)) for size in (301, 13, 3)])
        labels = (torch.rand(64) < torch.sigmoid(dense[:, 0] - ids[1] / 6)).double()
        logits = model(dense, [*ids], [torch.arange(64)] * 3)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
        rows = zip(dense.tolist(), ids.T[:, :, None].tolist(), labels.tolist())
        batches.append([dict(dense=x, bags=bags, label=label) for x, bags, label in rows])
    learned = scripts.evaluate(
        """([weights, batches, relu]) => {
            const memory = {};
            for (const batch of batches) step(weights, memory, batch, 0.1, relu);
            return weights;
        }""",
        [start, batches, relu],
    )
    assert list(learned) == list(model.state_dict())
    for name, numbers in model.state_dict().items():
        difference = torch.tensor(learned[name], dtype=torch.float64) - numbers
        assert difference.abs().max() < 1e-9, name
        assert (numbers - torch.tensor(start[name])).abs().max() > 0.01, f"{name} learned nothing"


def test_the_plane_is_fitted_as_by_scikit_learn(scripts):
    random = np.random.default_rng(3)
    points, truth = random.normal(0, 0.3, (2, 12, 2))
    expected = cross_val_predict(LinearRegression(), points, truth, cv=12)
    found = scripts.evaluate("([a, b]) => placed(a, b)", [points.tolist(), truth.tolist()])
    assert np.abs(np.array(found) - expected).max() < 1e-6


def test_the_page_tosses_its_coins_by_the_rule(scripts, notebook):
    truth, tosses = small_world(), 20_000
    rule = notebook.DLRM([301, 13, 3], 2, [], [], num_dense=2)
    rule.load_state_dict({name: torch.as_tensor(x) for name, x in truth.items()})
    drawn = scripts.evaluate(
        """([truth, tosses]) => {
            const random = evenly(1);
            return Array.from({ length: tosses }, () => toss(truth, random));
        }""",
        [plain(truth), tosses],
    )
    dense = torch.tensor([one["dense"] for one in drawn])
    ids = torch.tensor([one["bags"] for one in drawn]).squeeze(2).T.contiguous()
    labels = torch.tensor([one["label"] for one in drawn])
    chances = torch.sigmoid(rule(dense, [*ids], [torch.arange(tosses)] * 3)).detach()
    assert dense.expm1().mean(0).tolist() == pytest.approx([3, 1], abs=0.05)
    assert dense.expm1().var(0).tolist() == pytest.approx([3, 1], abs=0.15)
    for bag, size in zip(ids, (301, 13, 3)):
        assert bag.min() == 1 and bag.max() == size - 1
    for tenth in chances.argsort().split(tosses // 10):  # standard error at most 0.011
        clicked, promised = labels[tenth].double().mean().item(), chances[tenth].mean().item()
        assert clicked == pytest.approx(promised, abs=0.045)


def test_other_seeds_start_as_pytorch_does(scripts, notebook):
    weights = plain(film_model(notebook).state_dict())
    fresh = scripts.evaluate("weights => untrained(weights, evenly(2))", weights)
    for name, numbers in weights.items():
        one, other = torch.tensor(numbers), torch.tensor(fresh[name])
        assert one.shape == other.shape and not torch.equal(one, other)
        if one.numel() > 15:
            assert other.std().item() == pytest.approx(one.std().item(), rel=0.5)
            assert other.abs().max().item() == pytest.approx(one.abs().max().item(), rel=0.3)


def test_a_button_trains_by_keyboard_and_says_how_far_it_is(fresh):
    form, other = fresh.locator("form").nth(1), fresh.locator("form").nth(3)
    clock, before = fresh.context.new_cdp_session(fresh), other.inner_html()
    clock.send("Performance.enable", {"timeDomain": "threadTicks"})  # other programs don't count

    def seconds():
        metrics = clock.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    started = seconds()
    form.locator("[name=train]").focus()
    fresh.keyboard.press("Enter")
    assert form.locator("[name=train]").inner_text() == "Stop"
    wait_until_trained(fresh)
    took = seconds() - started
    print(f"{seen(form) / took:,.0f} impressions a second of one core")
    assert seen(form) >= 50_000 and took < 10
    losses = [row.split("\t") for row in form.locator("table").first.inner_text().split("\n")[1:]]
    assert [row[:2] for row in losses] == [["to 1,000", "0.680"], ["to 50,000", "0.500"]]
    assert 0.6 < float(losses[0][2]) < 0.71 and float(losses[1][2]) < 0.55
    assert other.inner_html() == before


def astray(form):
    """How far the films stand from their rings, in the plane's units, on average."""
    return form.locator("svg").evaluate(
        """svg => {
            const far = [...svg.querySelectorAll("g")].flatMap(g => {
                const [dot, ring] = [...g.querySelectorAll("circle")].map(({ cx, cy }) =>
                    [cx.baseVal.value, cy.baseVal.value]);
                return ring ? Math.hypot(dot[0] - ring[0], dot[1] - ring[1]) : [];
            });
            return far.reduce((sum, x) => sum + x) / far.length;
        }"""
    )


def test_films_walk_to_their_places_from_another_seed_too(fresh):
    form = fresh.locator("form").nth(1)
    form.locator("[name=rate]").fill("0.2")
    form.locator("[name=anew]").click()
    start = astray(form)
    form.locator("[name=train]").click()
    wait_until_trained(fresh)
    assert start > 0.7 and astray(form) < 0.25


def test_it_stops_when_told_and_out_of_sight_and_goes_on(fresh):
    form = fresh.locator("form").nth(1)
    button = form.locator("[name=train]")
    button.click()
    fresh.wait_for_timeout(100)
    button.click()
    after = seen(form)
    fresh.wait_for_timeout(100)
    assert 0 < seen(form) == after < 50_000
    button.click()
    fresh.wait_for_timeout(100)
    fresh.evaluate("scrollTo(0, 0); document.querySelector('form').style.height = '4000px'")
    wait_until_trained(fresh)
    assert after < seen(form) < 50_000


def test_who_wants_no_motion_sees_a_new_state_once_a_second(browser, address):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(address)
    form = page.locator("form").nth(1)
    page.evaluate(
        """() => {
            window.drawn = 0;
            const div = document.querySelectorAll("form")[1].lastChild;
            new MutationObserver(() => drawn++).observe(div, { childList: true });
        }"""
    )
    started = time.perf_counter()
    form.locator("[name=train]").click()
    wait_until_trained(page)
    assert page.evaluate("drawn") <= 4 + time.perf_counter() - started
    page.close()


@pytest.mark.parametrize("width", [1000, 390])
def test_labels_cover_no_dot_and_no_other_label(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(address)
    form = page.locator("form").nth(1)
    for stage, viewer in itertools.product(("0", "1", "2", "3"), ("1", "17", "171")):
        form.locator("[name=stage]").fill(stage)
        form.locator("[name=who]").fill(viewer)
        boxes = form.locator("svg").evaluate(
            """svg => {
                const box = one => { const r = one.getBoundingClientRect();
                    return [r.left, r.top, r.right, r.bottom]; };
                return { texts: [...svg.querySelectorAll("text")].map(box),
                    dots: [...svg.querySelectorAll("circle")].map(box), svg: box(svg) };
            }"""
        )
        assert len(boxes["texts"]) > 3
        pairs = [*itertools.combinations(boxes["texts"], 2)]
        pairs += itertools.product(boxes["texts"], boxes["dots"])
        for one, other in pairs:
            apart = max(one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3])
            assert apart > -1.5, (stage, viewer)  # pixels: a box is larger than its letters
        for text in boxes["texts"]:
            assert text[0] >= boxes["svg"][0] - 1 and text[2] <= boxes["svg"][2] + 1
    page.close()


@pytest.mark.parametrize("width", [1000, 390])
def test_nothing_is_wider_than_the_window(opened, width):
    opened[0].set_viewport_size({"width": width, "height": 800})
    assert opened[0].evaluate("document.documentElement.scrollWidth") == width


def test_the_page_stays_where_it_is_scrolled(fresh):
    fresh.evaluate("scrollTo(0, 600)")
    fresh.wait_for_timeout(300)
    assert fresh.evaluate("scrollY") == 600


def test_a_still_gives_way_to_the_picture_that_moves(opened, browser, address):
    assert not opened[0].get_by_alt_text("a still").is_visible()
    without = browser.new_page(java_script_enabled=False)
    without.goto(address)
    assert without.get_by_alt_text("a still").is_visible()
    without.close()


def test_every_input_has_a_name(opened):
    nameless = opened[0].evaluate(
        """[...document.querySelectorAll("input, button")].filter(one =>
            !one.labels?.[0]?.textContent.trim() && !one.textContent.trim()).length"""
    )
    assert nameless == 0


def test_the_scripts_are_short():
    for name, most in [("live.html", 170), ("training.js", 90), ("world.js", 40), ("live.css", 40)]:
        lines = (ROOT / "figures" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= most, name
        assert max(map(len, lines)) <= 100, name
