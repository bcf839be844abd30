"""The page and its live pictures in a real browser: they count as PyTorch does, without a network.

Skipped where playwright or Chromium is missing.
"""

import shutil

import nbformat
import pytest
import torch
from nbconvert import HTMLExporter

from budgets import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,  # starting a browser takes some seconds
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


def page_of(cells):
    """The page that `make run` would leave of these cells."""
    exporter = HTMLExporter(extra_template_basedirs=[str(ROOT / "figures")], template_name="page")
    return exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))[0]


def cell_with(html):
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    return nbformat.v4.new_code_cell("live(...)", outputs=[output])


@pytest.fixture(scope="module")
def pictures(notebook):
    """The pictures' HTML: Mira's films, and people's with titles that look like code."""
    torch.manual_seed(0)
    people = notebook.DLRM([40, 5, 40], 4, [3], [8], num_dense=1)
    titles = [f"Film {k}" for k in range(1, 39)] + ['</script><b>"Amélie" & co']
    films = [[title, k + 1, [[k + 1], [1 + k % 4]]] for k, title in enumerate(titles)]
    hers = notebook.DLRM([4, 4, 3], embedding_dim=2, bottom_mlp=[3], top_mlp=[2], num_dense=2)
    mira = notebook.live(
        "films", stages=[{"weights": hers.state_dict()}], who="liked", liked=[1, 2],
        genres=notebook.genre_names, films=notebook.film_names, hours=notebook.hour_names,
        kinds=["other", "comedy", "horror", "both"],
    )  # fmt: skip
    ticks = notebook.live("people", weights=people.state_dict(), dense=[0.0], films=films)
    return {"hers": hers, "people": people, "films": films, "html": [mira.data, ticks.data]}


@pytest.fixture(scope="module")
def opened(pictures, tmp_path_factory):
    """The page in the browser, and every address that it asked for."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    heading = nbformat.v4.new_markdown_cell('<a id="one"></a>\n# A page')
    path.write_text(page_of([heading, *map(cell_with, pictures["html"])]), encoding="utf-8")
    asked, errors = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        yield page, asked, errors
        browser.close()


def shown(form):
    """The probabilities that a picture's ranking shows, by name."""
    rows = form.locator("li").all()
    values = [float(row.locator("data").first.get_attribute("value")) for row in rows]
    names = [row.inner_text().rsplit(" ", 1)[0].strip() for row in rows]
    return dict(zip(names, values))


def expected(model, dense, bags):
    """The probability by PyTorch, from one example's bags."""
    indices, offsets = [torch.tensor(bag) for bag in bags], [torch.tensor([0])] * len(bags)
    return torch.sigmoid(model(dense[None], indices, offsets)).item()


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
        assert probability == pytest.approx(expected(pictures["hers"], dense, bags), abs=5e-5)


def test_ticked_films_give_ten_others(opened, pictures):
    form = opened[0].locator("form").nth(1)
    form.locator("[name=find]").fill("amé")
    assert form.locator("label:visible:has([type=checkbox])").count() == 1
    form.get_by_label("Amélie").check()
    form.locator("[name=find]").fill("")
    form.get_by_label("Film 7", exact=True).check()
    model, bags = pictures["people"], {title: own for title, _, own in pictures["films"]}
    ticked = ['</script><b>"Amélie" & co', "Film 7"]
    liked = [liked for title, liked, _ in pictures["films"] if title in ticked]
    scores = {
        title: expected(model, torch.zeros(1), [*own, liked])
        for title, own in bags.items()
        if title not in ticked
    }
    best = sorted(scores, key=scores.get, reverse=True)[:10]
    assert shown(form) == pytest.approx({title: scores[title] for title in best}, abs=5e-5)


def test_nothing_is_wider_than_a_phone(opened):
    width = opened[0].evaluate("document.documentElement.scrollWidth")
    assert width == 390


def test_the_script_is_short():
    text = (ROOT / "figures/live.html").read_text(encoding="utf-8")
    lines = text.split("<script>\n")[1].split("</script>")[0].splitlines()
    assert len(lines) <= 124  # 120, and what hides their names from the page
    assert max(map(len, lines)) <= 100
