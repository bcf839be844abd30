"""DLRM.ipynb keeps its budgets of time, words and lines, was run in order, and leads nowhere wrong.

`python tests/budgets.py` prints the counts by section.
"""

import json
import re
import statistics

import pytest

from budgets import (
    ROOT,
    Section,
    code_cells,
    core_and_appendices,
    is_folded,
    lines_of_code,
    minutes_up_to,
    opening_and_part_one,
    parts_of,
    read_notebook,
    sections,
    tags,
    totals,
    words_of_prose,
)
from notebook_numbers import text_of

NOTEBOOK = read_notebook()
CELLS = code_cells(NOTEBOOK)
FOUND = sections(NOTEBOOK)
CORE, APPENDICES = core_and_appendices(FOUND)
MARKDOWN = [cell["source"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
OUTPUTS = [output for cell in CELLS for output in cell["outputs"]]


def markdown(text):
    return {"cell_type": "markdown", "source": text, "metadata": {}}


def code(text, *tags):
    return {"cell_type": "code", "source": text, "metadata": {"tags": [*tags]}}


# ---- The counting itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("## 3. Several names", 3),
        ('Two **words**.\n\n<img src="a.svg" alt="not these words">', 2),
        ("| a | table |\n|---|---|\n| is | not counted |\nbut this", 2),
        ("<details><summary>Solution</summary>\n\nmany words here\n</details>\nafter it", 2),
        ("[the link](https://example.org/a%20b) and ![no picture](p.png)", 3),
        ("a · b − c", 3),
    ],
)
def test_words_are_those_that_are_read(text, words):
    assert words_of_prose(text) == words


def test_lines_of_code_are_neither_blank_nor_comments():
    assert lines_of_code(code("# why\n\nx = 1  # what\n    # more\ny = (\n    2\n)")) == 4


def test_sections_and_parts_are_found_by_their_headings():
    found = sections(
        {
            "cells": [
                markdown("# Title\none two"),
                code("import math"),
                markdown('# Part I: by hand\n\n<a id="s"></a>\n## 1. First\nfour more words here'),
                code("a = 1\nb = 2"),
                markdown("```sh\n# no heading\n```\n## 2. Second\nx"),
                markdown("# Part II: learning\n## 8. Eighth\nx"),
                markdown("# Appendices\nintroduction"),
                markdown("## A. Draw it\nx"),
                code("c = 3"),
                markdown("### Exercises\n1. Not counted at all.\n#### An hour\nNeither."),
                markdown("Nor this.\n\n### References\nbut this"),
            ]
        }
    )
    names = ["", "", "", "1", "2", "", "8", "", "A"]
    assert [section.name for section in found] == names
    core, appendices = core_and_appendices(found)
    assert totals(core)["lines"] == 3 and totals(appendices)["lines"] == 1
    assert totals(opening_and_part_one(found))["cells"] == 2
    assert [section.words for section in found if section.name == "1"] == [8]
    assert appendices[-1].words == 3 + 1 + 3
    assert parts_of("```\n# no\n```\n# yes") == ["```\n  no\n```\n", "# yes"]


def test_minutes_are_words_and_open_lines():
    cells = [code("a = 1\nb = 2\nc = 3"), code("d = 4\ne = 5", "hide-input")]
    section = Section(part="", name="1", words=360, cells=cells)
    assert section.minutes == pytest.approx(2 + 24 / 60)
    assert (section.lines, section.folded, totals([section])["all lines"]) == (3, 2, 5)


def test_minutes_up_to_a_cell_count_what_stands_before_it():
    cells = [markdown("## 1. First\n" + "word " * 178), code("a = 1"), markdown("later"), code("b")]
    assert minutes_up_to({"cells": cells}, "a =") == pytest.approx(180 / 180 + 8 / 60)
    with pytest.raises(ValueError, match="no code cell"):
        minutes_up_to({"cells": cells}, "c =")


# ---- The budgets -----------------------------------------------------------------------------

BUDGETS = [
    ("Part I", "minutes", 33),
    ("core", "minutes", 76),
    ("core", "lines", 380),
    ("core", "all lines", 430),
    ("core", "words", 4_500),
    ("appendices", "lines", 530),
    ("appendices", "words", 4_700),
]
GROUPS = {"Part I": opening_and_part_one(FOUND), "core": CORE, "appendices": APPENDICES}
LINES_A_CELL = {"core": (6, 14, 20), "appendices": (10, 17, 24)}  # median, nine of ten, longest


@pytest.mark.parametrize("part, count, budget", BUDGETS)
def test_reading_takes_no_longer_than_its_budget(part, count, budget):
    assert totals(GROUPS[part])[count] <= budget


@pytest.mark.parametrize("words, minutes", [("fit(film_model", 44), ("my_films =", 66)])
def test_what_the_opening_promises_comes_in_time(words, minutes):
    """By then he has seen the model learn which film is funny, and has ten films of his own."""
    assert minutes_up_to(NOTEBOOK, words) <= minutes


def test_there_are_twelve_sections_and_the_appendices_a_to_h():
    assert [section.name for section in CORE if section.name] == [str(n) for n in range(1, 13)]
    assert [section.name for section in APPENDICES if section.name] == [*"ABCDEFGH"]


@pytest.mark.parametrize("section", [s for s in APPENDICES if s.name], ids=lambda s: s.name)
def test_an_appendix_takes_18_minutes(section):
    assert section.minutes <= 18


@pytest.mark.parametrize("name", ["Part I", "Part II"])
def test_the_map_says_the_minutes_as_they_are(name):
    """The opening's table has a row for each part, whose last column is at most two minutes off."""
    first = opening_and_part_one(FOUND)
    chosen = first if name == "Part I" else CORE[len(first) :]
    stated = re.search(rf"^\|.*\[{name}\].*\| *(\d+) *\|$", MARKDOWN[0], flags=re.MULTILINE)
    assert stated, f"the map has no minutes for {name}"
    assert abs(int(stated[1]) - totals(chosen)["minutes"]) <= 2


@pytest.mark.parametrize("part", LINES_A_CELL)
def test_cells_are_short(part):
    cells = [cell for section in GROUPS[part] for cell in section.cells]
    lengths = sorted(lines_of_code(cell) for cell in cells if not is_folded(cell))
    median, nine_of_ten, longest = LINES_A_CELL[part]
    assert statistics.median(lengths) <= median
    assert lengths[int(0.9 * len(lengths))] <= nine_of_ten
    assert lengths[-1] <= longest


def test_no_line_of_code_is_over_80_columns():
    lines = [line for cell in CELLS for line in cell["source"].splitlines()]
    assert not [line for line in lines if len(line) > 80]


def test_asserts_stand_where_they_teach():
    lines = [line for cell in CELLS for line in cell["source"].splitlines()]
    assert sum(line.lstrip().startswith("assert ") for line in lines) <= 36


def test_the_file_is_below_two_megabytes():
    assert (ROOT / "DLRM.ipynb").stat().st_size < 2_000_000


# ---- As it was run ---------------------------------------------------------------------------


def test_it_was_executed_top_to_bottom():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))


def test_outputs_hold_no_stderr_no_error_no_state_of_widgets_and_no_progress_bar():
    for output in OUTPUTS:
        assert output.get("name") != "stderr" and output["output_type"] != "error"
    assert "widgets" not in NOTEBOOK["metadata"]
    assert not re.search(r"\d+%\|", json.dumps(OUTPUTS))


def test_it_names_no_machine():
    text = json.dumps(NOTEBOOK)
    folders = r"/(home|root|tmp|Users|work|mnt)/|[A-Z]:\\\\"
    assert not re.search(folders + r"|0x[0-9a-f]{8}", text)


def test_one_cell_is_tagged_parameters_and_holds_them_all():
    (cell,) = [cell for cell in CELLS if "parameters" in tags(cell)]
    names = re.findall(r"^(\w+) =", cell["source"], flags=re.MULTILINE)
    assert sorted(names) == [
        "batch_size",
        "data_generation",
        "device",
        "embedding_dim",
        "learning_rate",
        "num_epochs",
        "num_rows",
        "processed_folder",
        "ratings_file",
        "raw_data_file",
        "seed",
    ]


def test_a_cell_whose_numbers_may_differ_is_not_compared_to_the_letter():
    approximate = [cell for cell in CELLS if "approximate" in tags(cell)]
    assert approximate
    for cell in approximate:
        assert "nbval-ignore-output" in tags(cell), cell["id"]
        assert re.search(r"\d", text_of(cell["outputs"])), f"{cell['id']} prints no number"


# ---- Pictures and links ----------------------------------------------------------------------


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def test_every_linked_file_exists():
    text = without_code("\n".join(MARKDOWN))
    files = re.findall(r'(?:src|href)="(?!http|#)([^"]+)"', text)
    files += re.findall(r"\]\((?!http|#)([^)#\s]+)\)", text)
    assert files
    assert not [name for name in files if not (ROOT / name).exists()]


def test_every_picture_says_what_it_shows():
    pictures = re.findall(r"<img\b[^>]*>", "\n".join(MARKDOWN))
    assert pictures
    for picture in pictures:
        assert re.search(r'alt="[^"]{20,}"', picture), picture
    assert not re.search(r"!\[\]\(", "\n".join(MARKDOWN))


def test_every_anchor_exists_once():
    text = "\n".join(MARKDOWN)
    anchors = re.findall(r'<a (?:id|name)="([^"]+)"', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(anchors)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(anchors)


@pytest.mark.parametrize(
    "cell", [c for c in CELLS if "plt.show()" in c["source"]], ids=lambda c: c["id"]
)
def test_plots_are_stored_as_png(cell):
    assert any("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_a_cell_that_only_draws_is_folded_on_the_page():
    drawn = [cell for cell in CELLS if re.search(r"^(pictures|live)\.", cell["source"], re.M)]
    assert drawn and all(
        "hide-input" in tags(cell) for cell in drawn if "print(" not in cell["source"]
    )


def test_every_section_but_the_last_asks_what_was_understood():
    """Two or three questions with folded answers stand at the end of each section."""
    text = "\n".join(MARKDOWN)
    starts = list(re.finditer(r"^## (\d+|[A-H])\. ", text, flags=re.MULTILINE))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    for start, end in zip(starts, ends):
        questions = text[start.start() : end].count("<details><summary>")
        assert start[1] in ("12", "G") or 2 <= questions <= 5, start[1]


def test_every_cell_that_plots_ends_the_plot():
    for cell in CELLS:
        if re.search(r"^(figure|fig|_).*= plt\.subplot", cell["source"], flags=re.MULTILINE):
            assert "plt.show()" in cell["source"], cell["id"]
