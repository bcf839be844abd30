"""A pytest plugin: in cells whose digits may differ, nbval's fresh numbers against the stored ones.

nbval compares a cell's text to the letter, or not at all. Between the two stands a cell tagged both
`nbval-ignore-output` and `approximate`: its words have to be the stored ones, and each number has
to lie within a tolerance of the stored number, 5 % of it and 0.01. The cell's metadata may hold
another share, as `"tolerance": 0.2`. Nothing is executed a second time.
"""

import re

import pytest

TOLERANCE = 0.05  # relative
SMALLEST = 0.01  # absolute, so that numbers near 0 may differ at all
# A number stands alone: the 4 of C4 and the 32 of float32 belong to words.
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?")


def text_of(outputs):
    """What a cell printed, and the text of what it displayed."""
    printed = [o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout"]
    shown = [o["data"]["text/plain"] for o in outputs if "text/plain" in o.get("data", {})]
    return "".join(printed) + "\n" + "\n".join(shown)


def words_and_numbers(text):
    """The text between the numbers, without its spaces, and the numbers."""
    words = [" ".join(part.split()) for part in NUMBER.split(text)]
    numbers = [number.replace(",", "").replace("−", "-") for number in NUMBER.findall(text)]
    return words, [float(number) for number in numbers]


def difference(stored, fresh, tolerance=TOLERANCE):
    """What tells the two texts apart, in a sentence, or None."""
    (words, numbers), (fresh_words, fresh_numbers) = map(words_and_numbers, (stored, fresh))
    if len(numbers) != len(fresh_numbers):
        return f"{len(numbers)} numbers are stored, {len(fresh_numbers)} came out"
    for before, word, fresh_word in zip(["", *numbers], words, fresh_words):
        if word != fresh_word:
            return f"after the number {before}: {word!r} is stored, {fresh_word!r} came out"
    for place, (number, fresh_number) in enumerate(zip(numbers, fresh_numbers), start=1):
        if not abs(number - fresh_number) <= SMALLEST + tolerance * abs(number):
            return f"number {place}: {number:g} is stored, {fresh_number:g} came out"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After nbval ran the cell of a notebook, compare its numbers if its tags ask for it."""
    result = yield
    cell = getattr(item, "cell", None)
    if cell is not None and "approximate" in cell.metadata.get("tags", []):
        tolerance = cell.metadata.get("tolerance", TOLERANCE)
        found = difference(text_of(cell.outputs), text_of(item.test_outputs), tolerance)
        if found:
            fresh = text_of(item.test_outputs)
            item.raise_cell_error(f"Other numbers than stored: {found}", fresh)
    return result
