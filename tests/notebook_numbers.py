"""A pytest plugin: in cells whose digits may differ, nbval's fresh numbers against their noise.

nbval compares a cell's text to the letter, or not at all. Between the two stands a cell tagged both
`nbval-ignore-output` and `approximate`. Its words have to be the stored ones. Each number has to
lie where it may come out on another machine: `tests/benchmarks/arithmetic.py` ran the notebook in
twelve arithmetics and wrote the smallest and the largest value of each into `notebook_ranges.json`.

How far outside? Twelve runs don't see the widest that there is. The next one of a normal number
lies outside of what twelve span in 15 % of all cases, outside of that and as much again on either
side in 0.08 %, and with one and a half times as much in 0.008 %. A notebook has some 150 such
numbers, so on one machine in a hundred one of them fails by bad luck. (With long tails, as one
prediction of a model has, it's 0.4 % each: a cell should print something steadier.) A number may
always differ by one in its last printed digit.

A cell whose metadata say `"needs": "torchrec"` is compared only where that package is installed.

    python tests/notebook_numbers.py        names the cells that have to be measured again
"""

import hashlib
import importlib.util
import json
import re
import sys
from decimal import Decimal
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
RANGES = Path(__file__).with_name("notebook_ranges.json")
REMAKE = "python tests/benchmarks/arithmetic.py"
OUTSIDE = 1.5  # times the width of the range, on either side
# A number stands alone: the 4 of C4 and the 32 of float32 belong to words.
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?")


def text_of(outputs):
    """What a cell printed, and the text of what it displayed."""
    printed = [o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout"]
    shown = [o["data"]["text/plain"] for o in outputs if "text/plain" in o.get("data", {})]
    return "".join(printed) + "\n" + "\n".join(shown)


def words_and_numbers(text):
    """The text between the numbers, without its spaces, and the numbers as they are printed."""
    words = [" ".join(part.split()) for part in NUMBER.split(text)]
    numbers = [number.replace(",", "").replace("−", "-") for number in NUMBER.findall(text)]
    return words, numbers


def last_digit(number):
    """What one more in its last digit adds to a printed number."""
    return float(Decimal(1).scaleb(Decimal(number).as_tuple().exponent))


def is_approximate(cell):
    """Is this cell one whose numbers are compared by their noise?"""
    return "approximate" in cell["metadata"].get("tags", [])


def lacks_a_package(cell):
    """Does the cell need a package that isn't installed here?"""
    package = cell["metadata"].get("needs")
    return package is not None and importlib.util.find_spec(package) is None


def fingerprint(cell):
    """A few digits of a hash of the cell's source."""
    return hashlib.sha256(cell["source"].encode()).hexdigest()[:8]


def read_ranges(path=RANGES):
    """The settings that were run; of each cell its fingerprint and the ranges of its numbers."""
    if not Path(path).exists():
        return {"settings": [], "cells": {}}
    return json.loads(Path(path).read_text(encoding="utf-8"))


def difference(stored, fresh, ranges):
    """What tells two texts of a cell apart, in a sentence, or None.

    ranges: the smallest and the largest value of each number.
    """
    (words, numbers), (fresh_words, fresh_numbers) = map(words_and_numbers, (stored, fresh))
    if len(numbers) != len(fresh_numbers):
        return f"{len(numbers)} numbers are stored, {len(fresh_numbers)} came out"
    for before, word, fresh_word in zip(["", *numbers], words, fresh_words):
        if word != fresh_word:
            return f"after the number {before}: {word!r} is stored, {fresh_word!r} came out"
    if len(numbers) != len(ranges):
        return f"{len(numbers)} numbers are stored, {len(ranges)} were measured; run {REMAKE}"
    for place, (number, new, (low, high)) in enumerate(zip(numbers, fresh_numbers, ranges), 1):
        room = max(OUTSIDE * (high - low), 1.001 * last_digit(number))
        span = f"{low:g} to {high:g} were measured"
        if not low - room <= float(number) <= high + room:
            return f"number {place}: {number} is stored, {span}; run {REMAKE}"
        if not low - room <= float(new) <= high + room:
            return f"number {place}: {number} is stored, {new} came out; {span} (± {room:.2g})"
    return None


def trouble(cell, measured):
    """Why a cell's numbers can't be compared, in a sentence, or None."""
    kept = measured["cells"].get(cell["id"])
    if kept is None:
        return f"nobody measured the noise of {cell['id']}; run {REMAKE}"
    if kept["source"] != fingerprint(cell):
        return f"{cell['id']} changed since its noise was measured; run {REMAKE}"
    stored = text_of(cell["outputs"])
    return difference(stored, stored, kept["ranges"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After nbval ran the cell of a notebook, compare its numbers if its tags ask for it."""
    result = yield
    cell = getattr(item, "cell", None)
    if cell is not None and is_approximate(cell) and not lacks_a_package(cell):
        measured = read_ranges()
        found, fresh = trouble(cell, measured), text_of(item.test_outputs)
        if not found:
            ranges = measured["cells"][cell["id"]]["ranges"]
            found = difference(text_of(cell["outputs"]), fresh, ranges)
        if found:
            item.raise_cell_error(f"Other numbers than stored: {found}", fresh)
    return result


def main(path=ROOT / "DLRM.ipynb"):
    """Print which cells have to be measured again; exit code 1 if there are any."""
    measured = read_ranges()
    cells = filter(is_approximate, nbformat.read(path, as_version=4).cells)
    found = [said for cell in cells if (said := trouble(cell, measured))]
    print(*found, sep="\n")
    sys.exit(f"Measure the noise again, in 15 minutes: {REMAKE}" if found else 0)


if __name__ == "__main__":
    main()
