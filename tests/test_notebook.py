"""Hygiene of the notebook file: executed in order, clean outputs, short cells, links that lead somewhere."""
import ast
import json
import re
import statistics

import pytest

from notebook_definitions import ROOT, code_cells, source, tags

NOTEBOOK = json.loads((ROOT / "DLRM.ipynb").read_text(encoding="utf-8"))
MARKDOWN = [source(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
OUTPUTS = [output for cell in code_cells() for output in cell["outputs"]]


def lines_of_code(cell):
    return len([line for line in source(cell).splitlines() if line.strip() and not line.strip().startswith("#")])


def prose(text):
    """Markdown as it is read: without folded solutions, tags and marks of headings."""
    return re.sub(r"<details>.*?</details>|<[^>]+>|^#+ |\[Map\]\(#map\)", "", text, flags=re.DOTALL | re.MULTILINE)


def test_it_was_executed_top_to_bottom():
    assert [cell["execution_count"] for cell in code_cells()] == list(range(1, len(code_cells()) + 1))


def test_outputs_hold_no_stderr_no_error_and_no_widget():
    assert not [output for output in OUTPUTS if output.get("name") == "stderr" or output["output_type"] == "error"]
    assert "widget" not in json.dumps(NOTEBOOK["metadata"]) and "widget-view" not in json.dumps(OUTPUTS)
    assert not re.search(r"\d+%\|", json.dumps(OUTPUTS))                       # what a progress bar leaves behind


def test_it_names_no_machine():
    text = json.dumps(NOTEBOOK)
    assert not re.search(r"/(home|root|tmp|Users|work|mnt)/|[A-Z]:\\\\|0x[0-9a-f]{8}", text)


def test_it_is_small():
    assert (ROOT / "DLRM.ipynb").stat().st_size < 1_500_000 and len(code_cells()) <= 120


def test_cells_are_short():
    lengths = sorted(map(lines_of_code, code_cells()))
    assert statistics.median(lengths) <= 8 and lengths[int(0.9 * len(lengths))] <= 25 and lengths[-1] <= 45
    words = [len(text.split()) for text in MARKDOWN]
    assert statistics.median(words) <= 60


def test_claims_are_checked_by_asserts():
    assert sum("assert" in source(cell) for cell in code_cells()) >= len(code_cells()) / 2


def test_one_cell_is_tagged_parameters_and_holds_them_all():
    (cell,) = [cell for cell in code_cells() if "parameters" in tags(cell)]
    names = re.findall(r"^(\w+) =", source(cell), flags=re.MULTILINE)
    assert names == ["data_generation", "raw_data_file", "processed_data_file", "num_rows", "embedding_dim", "batch_size",
                     "num_epochs", "learning_rate", "teaching_rows", "paper_sizes", "comparison_rows", "comparison_seeds", "seed", "device"]


def size_of_sections():
    """Words of prose, without folded solutions, and lines of code of each numbered section."""
    sizes, number = {}, 0
    for cell in NOTEBOOK["cells"]:
        text = source(cell)
        if cell["cell_type"] == "code":
            sizes[number][1] += len([line for line in text.splitlines() if line.strip()])
            continue
        heading = re.search(r"^## (\d+)\. ", text, flags=re.MULTILINE)
        number = int(heading[1]) if heading else number
        sizes.setdefault(number, [0, 0])[0] += len(prose(text).split())
    return sizes


def test_the_map_shows_every_section_and_its_paths_take_the_time_they_say():
    rows = re.findall(r"^\| \[(\d+)\]\(#section-\1\) \| ([^|]+) \|[^|]*\| (●?) ?\| (●?) ?\| (●?) ?\|$", MARKDOWN[0], flags=re.MULTILINE)
    sizes = size_of_sections()
    assert [int(row[0]) for row in rows] == [*range(1, 18)] == [*sizes][1:]
    for path, minutes in enumerate([15, 45, 90], start=2):
        words, lines = [sum(sizes[int(row[0])][k] for row in rows if row[path]) for k in (0, 1)]
        assert 0.8 * minutes < words / 130 + lines / 30 < minutes, (minutes, words, lines)


def test_every_section_leads_back_to_the_map():
    assert sum("[Map](#map)" in text for text in MARKDOWN) == 16


def draws(cell):
    return "plt.show()" in source(cell) or "draw_scores(" in source(cell)


@pytest.mark.parametrize("cell", [cell for cell in code_cells() if draws(cell)], ids=lambda cell: cell["id"])
def test_plots_are_stored_as_png(cell):
    only_defines = all(isinstance(node, ast.FunctionDef) for node in ast.parse(source(cell)).body)
    pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == (0 if only_defines else 1)


def test_every_cell_that_plots_ends_the_plot():
    assert all(draws(cell) for cell in code_cells() if "plt.subplots" in source(cell))


def test_links_and_pictures_lead_somewhere():
    texts = {"DLRM.ipynb": "\n".join(MARKDOWN), "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    for text in texts.values():
        for path in re.findall(r'<img src="([^"]+)"', text) + re.findall(r"!?\[[^\]]*\]\((?!http|#)([^)#]+)\)", text):
            assert (ROOT / path).exists(), path
        for picture in re.findall(r"<img [^>]*>", text):
            assert re.search(r'alt="[^"]{20,}"', picture), picture
    anchors = re.findall(r'<a id="([^"]+)"', texts["DLRM.ipynb"])
    targets = re.findall(r"\]\(#([^)]+)\)", texts["DLRM.ipynb"])
    assert len(anchors) == len(set(anchors)) and set(targets) <= set(anchors)


def test_requirements_are_pinned_with_a_reason():
    for line in [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]:
        assert line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+ +# .+", line), line
