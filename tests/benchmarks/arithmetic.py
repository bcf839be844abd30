"""How far each number of DLRM.ipynb moves when only the arithmetic changes: some 15 minutes.

Training magnifies the last bit. Another processor adds in another order, so it ends at other
weights. One machine can imitate others: PyTorch, MKL and OpenBLAS are told to use other
instructions, or two threads; or every weight starts one unit in its last place away. This runs the
notebook in each of twelve ways, two at once, each in a folder of its own. Of each number in a cell
tagged `approximate` it writes the smallest and the largest value into `tests/notebook_ranges.json`,
which `tests/notebook_numbers.py` compares with, and prints those that move most.

    python tests/benchmarks/arithmetic.py                      after `make execute`
    python tests/benchmarks/arithmetic.py --until section-9    no further; the cells after it stay
    python tests/benchmarks/arithmetic.py --seeds 3            compares with the spread of seeds

The executed notebooks stay in build/arithmetic: what the text claims has to hold in all of them.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from notebook_numbers import (  # noqa: E402
    RANGES,
    fingerprint,
    is_approximate,
    last_digit,
    read_ranges,
    text_of,
    words_and_numbers,
)

KEPT = ROOT / "build/arithmetic"  # the executed notebooks
OTHER_PYTORCH = {"ATEN_CPU_CAPABILITY": "default"}
OTHER_MKL = {"MKL_CBWR": "COMPATIBLE"}
OTHER_NUMPY = {"OPENBLAS_CORETYPE": "Nehalem"}
# Name: the environment, and what the kernel executes before the notebook's first cell.
SETTINGS = {
    "as it is": ({}, ""),
    "ATEN_CPU_CAPABILITY=default": (OTHER_PYTORCH, ""),
    "MKL_CBWR=COMPATIBLE": (OTHER_MKL, ""),
    "both, and OPENBLAS_CORETYPE=Nehalem": (OTHER_PYTORCH | OTHER_MKL | OTHER_NUMPY, ""),
    # Passive: beside another notebook, a thread that spins would keep the others waiting.
    "two threads": ({"OMP_WAIT_POLICY": "PASSIVE"}, "use_two_threads()"),
}
for coins in range(1, 8):
    SETTINGS[f"weights moved by a last bit, {coins}"] = ({}, f"move_weights({coins})")


def use_two_threads():
    """PyTorch computes with two threads from here on, whatever is asked for."""
    import torch

    torch.set_num_threads(2)
    torch.set_num_threads = lambda number: None


def move_weights(seed):
    """From here on an optimizer first moves each weight by one unit in its last place.

    A coin says up or down. The same weights are always moved alike, so that two trainings that
    have to be equal stay so.
    """
    import torch

    start = torch.optim.Optimizer.__init__

    @torch.no_grad()
    def moved(self, *arguments):
        start(self, *arguments)
        coins = torch.Generator().manual_seed(seed)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            up = torch.randint(2, parameter.shape, generator=coins).bool()
            target = torch.where(up, torch.inf, -torch.inf).to(parameter)
            parameter.copy_(torch.nextafter(parameter, target))

    torch.optim.Optimizer.__init__ = moved


def cells_until(notebook, last):
    """The notebook's cells up to the last one whose id starts with `last`."""
    places = [place for place, cell in enumerate(notebook.cells) if cell.id.startswith(last)]
    if not places:
        sys.exit(f"no cell's id starts with {last!r}")
    return notebook.cells[: places[-1] + 1]


def checkout(folder):
    """A copy of what the notebook needs, so that runs at once share no file."""
    for path in [*ROOT.glob("*.py"), ROOT / "DLRM.ipynb"]:  # saved models need its classes
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "figures", folder / "figures")
    (folder / "data").mkdir()
    for path in [*(ROOT / "data").glob("*.py"), *(ROOT / "data").glob("*.whl")]:
        shutil.copy(path, folder / "data")


def executed(notebook, setting, parameters=""):
    """The notebook's cells, executed in one setting, and the seconds that it took."""
    environment, first = SETTINGS[setting]
    if first:
        path = str(Path(__file__).parent)
        first = f"import sys\nsys.path.insert(0, {path!r})\nimport arithmetic\narithmetic.{first}"
    cells = [nbformat.v4.new_code_cell(first)]
    for cell in notebook.cells:
        cells.append(copy.deepcopy(cell))
        if "parameters" in cell.metadata.get("tags", []):
            cells.append(nbformat.v4.new_code_cell(parameters))
    run = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        checkout(Path(place))
        client = NotebookClient(run, timeout=900, allow_errors=True, coalesce_streams=True)
        client.resources = {"metadata": {"path": place}}
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    return run, time.perf_counter() - started


def run_all(notebook, settings, parameters, processes):
    """{name: {cell id: the executed cell}}; each run is kept as a notebook, too."""
    KEPT.mkdir(parents=True, exist_ok=True)

    def run(name, setting, parameters):
        try:
            done, seconds = executed(notebook, setting, parameters)
        except Exception as error:  # a dead kernel mustn't cost the other runs
            print(f"left out: {name}, {type(error).__name__}: {error}", flush=True)
            return None
        nbformat.write(done, KEPT / f"{name.replace(' ', '_')}.ipynb")
        print(f"{seconds:5.0f} s  {name}", flush=True)
        return {cell.id: cell for cell in done.cells if cell.cell_type == "code"}

    with ThreadPoolExecutor(processes) as pool:
        runs = {
            name: pool.submit(run, name, setting, given)
            for name, (setting, given) in zip(settings, parameters)
        }
        done = {name: run.result() for name, run in runs.items()}
    return {name: cells for name, cells in done.items() if cells}


def complaints(notebook, runs):
    """Sentences on what no range can mend: errors, other words, other letters."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        texts = {name: text_of(run[cell.id].outputs) for name, run in runs.items()}
        first = next(iter(texts.values()))
        for name, run in runs.items():
            if any(output.output_type == "error" for output in run[cell.id].outputs):
                yield f"{cell.id}: an error, {name}"
            elif is_approximate(cell):
                words, usual = (words_and_numbers(text)[0] for text in (texts[name], first))
                if words != usual:
                    yield f"{cell.id}: other words, {name}"
            elif (
                "nbval-ignore-output" not in cell.metadata.get("tags", []) and texts[name] != first
            ):
                yield f"{cell.id}: compared to the letter, and differs, {name}"


def ranges_of(cell, runs):
    """The smallest and the largest value of each number, over the runs with the usual words."""
    found = [words_and_numbers(text_of(run[cell.id].outputs)) for run in runs.values()]
    usual = found[0][0]
    rows = [list(map(float, numbers)) for words, numbers in found if words == usual]
    return [[min(values), max(values)] for values in zip(*rows)]


def write_ranges(cells, settings, path=RANGES):
    """One line a cell."""
    lines = [f"  {json.dumps(name)}: {json.dumps(about)}" for name, about in cells.items()]
    text = ",\n".join(lines)
    path.write_text(f'{{"settings": {json.dumps(settings)},\n "cells": {{\n{text}\n}}}}\n')


def print_widest(notebook, runs, most=40):
    """The numbers that move most, counted in units of the last digit that the cell prints.

    Beside them stands what was stored of them, for another spread such as that of seeds.
    """
    stored = read_ranges()["cells"]
    rows = []
    for cell in filter(is_approximate, notebook.cells):
        found = next(iter(runs.values()))[cell.id]
        words, numbers = words_and_numbers(text_of(found.outputs))
        kept = iter(stored.get(cell.id, {"ranges": []})["ranges"])
        for number, word, (low, high) in zip(numbers, words, ranges_of(cell, runs)):
            units, before = (high - low) / last_digit(number), next(kept, None)
            rows.append((units, cell.id, number, low, high, before, word[-30:]))
    print(
        f"\nof {len(rows)} numbers {sum(units > 10 for units, *_ in rows)} move by more than ten,"
    )
    print("in units of the last printed digit; the widest:")
    for units, name, number, low, high, before, word in sorted(rows, key=lambda row: -row[0])[
        :most
    ]:
        print(
            f"{units:8.1f}  {name:15} {number:>8}  {low:g} to {high:g}, {word!r}; stored: {before}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--until", default="", metavar="ID", help="e.g. section-9")
    parser.add_argument("--at-once", type=int, default=2, help="notebooks that run at once")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1; stores nothing")
    options = parser.parse_args()
    notebook = nbformat.read(ROOT / "DLRM.ipynb", as_version=4)
    notebook.cells = cells_until(notebook, options.until)
    if options.seeds:
        names = [f"seed {seed}" for seed in range(options.seeds)]
        parameters = [("as it is", f"seed = {seed}") for seed in range(options.seeds)]
    else:
        names, parameters = list(SETTINGS), [(name, "") for name in SETTINGS]
    runs = run_all(notebook, names, parameters, options.at_once)
    if len(runs) < len(names) / 2:
        sys.exit("More than half of the runs came to nothing; nothing is stored.")
    print_widest(notebook, runs)
    if options.seeds:
        return
    cells = read_ranges()["cells"] if options.until and RANGES.exists() else {}
    for cell in filter(is_approximate, notebook.cells):
        cells[cell.id] = {"source": fingerprint(cell), "ranges": ranges_of(cell, runs)}
    write_ranges(cells, list(runs))
    found = list(complaints(notebook, runs))
    print(*found, sep="\n")
    sys.exit("These cells have to be changed: no range can mend them." if found else 0)


if __name__ == "__main__":
    main()
