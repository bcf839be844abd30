"""How long DLRM.ipynb takes to read: words, lines and minutes of each section.

Code that is folded on the page (tagged `hide-input`) takes no minutes; its lines are counted apart.
Run `python tests/budgets.py [NOTEBOOK]` for the table. The tests compare it with what is promised.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
WORDS_PER_MINUTE = 180
SECONDS_PER_LINE = 8
SECTION = re.compile(r"^## (\d+|[A-Z])\. (.*)")


@dataclass
class Section:
    """One numbered section or appendix; `name` is "" before the first, `part` the `# ` heading."""

    part: str
    name: str
    title: str = ""
    words: int = 0
    cells: list = field(default_factory=list)

    @property
    def lines(self):
        return sum(lines_of_code(cell) for cell in self.cells if not is_folded(cell))

    @property
    def folded(self):
        return sum(lines_of_code(cell) for cell in self.cells if is_folded(cell))

    @property
    def minutes(self):
        return self.words / WORDS_PER_MINUTE + self.lines * SECONDS_PER_LINE / 60


def read_notebook(path=ROOT / "DLRM.ipynb"):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell["metadata"].get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def is_folded(cell):
    return "hide-input" in tags(cell)


def lines_of_code(cell):
    """Lines that are neither blank nor a comment alone."""
    lines = [line.strip() for line in cell["source"].splitlines()]
    return len([line for line in lines if line and not line.startswith("#")])


def words_of_prose(markdown):
    """Words as they are read: no folded solution, no table, no picture, no tag, no address."""
    text = without_details(markdown)
    text = re.sub(r"^\s*\|.*$|^#+ |^```.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<[^>]+>", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return len([word for word in text.split() if re.search(r"\w", word)])


def without_details(markdown):
    return re.sub(r"<details.*?</details>|<!--.*?-->", "", markdown, flags=re.DOTALL)


def parts_of(markdown):
    """A markdown cell cut before each heading; a comment in fenced code is no heading."""
    text = without_details(markdown)
    for code in re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE):
        text = text.replace(code, code.replace("\n#", "\n "))
    return re.split(r"^(?=#{1,6} )", text, flags=re.MULTILINE)


def sections(notebook):
    """The sections in order. Below a heading "Exercises", up to the next, no words are counted."""
    found = [Section(part="", name="")]
    exercises = 0  # the level of that heading, while we are below it
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            found[-1].cells.append(cell)
            continue
        for text in parts_of(cell["source"]):
            heading = text.partition("\n")[0]
            level = len(heading) - len(heading.lstrip("#"))
            if level and (not exercises or level <= exercises):
                is_theirs = re.fullmatch(r"#+ (\w+\. )?Exercises", heading.strip())
                exercises = level if is_theirs else 0
            if heading.startswith("# "):
                found.append(Section(part=heading[2:].strip(), name=""))
            elif match := SECTION.match(heading):
                found.append(Section(found[-1].part, name=match[1], title=match[2].strip()))
            if not exercises:
                found[-1].words += words_of_prose(text)
    return found


def core_and_appendices(found):
    """Sections before the heading `# Appendices`, and from there on."""
    places = [k for k, section in enumerate(found) if section.part == "Appendices"]
    end = places[0] if places else len(found)
    return found[:end], found[end:]


def opening_and_part_one(found):
    """Sections before the heading `# Part II`."""
    places = [k for k, section in enumerate(found) if re.match(r"Part II\b", section.part)]
    return found[: places[0]] if places else found


def minutes_up_to(notebook, words_in_cell):
    """Minutes to read to the end of the first code cell that holds these words."""
    for k, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code" and words_in_cell in cell["source"]:
            return totals(sections({"cells": notebook["cells"][: k + 1]}))["minutes"]
    raise ValueError(f"no code cell holds {words_in_cell!r}")


def totals(found):
    """Code cells, lines of open and of all code, words and minutes of some sections."""
    return {
        "cells": sum(len(section.cells) for section in found),
        "lines": sum(section.lines for section in found),
        "all lines": sum(section.lines + section.folded for section in found),
        "words": sum(section.words for section in found),
        "minutes": sum(section.minutes for section in found),
    }


def print_table(path=ROOT / "DLRM.ipynb"):
    found = sections(read_notebook(path))
    core, appendices = core_and_appendices(found)
    rows = [(f"{section.name:>2} {section.title or section.part}", [section]) for section in found]
    rows += [("   Opening and Part I", opening_and_part_one(found))]
    rows += [("   Core", core), ("   Appendices", appendices)]
    print(f"{'':52} {'cells':>6} {'lines':>6} {'all':>6} {'words':>6} {'minutes':>8}")
    for name, chosen in rows:
        *counts, minutes = totals(chosen).values()
        numbers = " ".join(f"{count:6}" for count in counts)
        print(f"{name[:52]:52} {numbers} {minutes:8.1f}")


if __name__ == "__main__":
    print_table(*sys.argv[1:])
