"""What the notebook's settings may be: what cannot, or contradicts another, is refused by name."""

from pathlib import Path

from data.files import hash_of

LEAST = {"seed": 0, "num_rows": 1000, "embedding_dim": 1, "batch_size": 1, "num_epochs": 1}
PATHS = ["ratings_file", "raw_data_file", "processed_folder"]
OTHERS = ["learning_rate", "device", "data_generation"]


def checked(settings, cuda):
    """(device, name of the run) of a dict of settings; ValueError says which cannot be, and why.

    cuda: is there a GPU? Device "auto" becomes "cuda" or "cpu". Runs with the same settings have
    the same name, all others have another. OSError where nothing can be written.
    """
    for name, holds, allowed in _rules(settings, cuda):
        if not holds:
            raise ValueError(f"{name} is {settings[name]!r}; allowed: {allowed}")
    try:
        Path("build").mkdir(exist_ok=True)
        probe = Path("build/.writable")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        where = "copy this folder to where you may write, and run it there"
        raise OSError(f"{error}; a run writes into build and data: {where}") from error
    device = settings["device"]
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    run = {name: settings[name] for name in [*LEAST, *PATHS, *OTHERS]} | {"device": device}
    return device, hash_of(run)[:8]


def _rules(settings, cuda):
    """Yield (name, does it hold?, what is allowed), in the order in which one builds on another."""
    for name, least in LEAST.items():
        value = settings[name]
        whole = type(value) is int  # papermill types 1e3 as a float, and True is an int
        yield name, whole and least <= value < 2**31, f"whole numbers, {least:,} or more"
    rate = settings["learning_rate"]
    yield "learning_rate", type(rate) in (int, float) and 0 < rate < 1e9, "numbers above 0"
    devices = ["auto", "cpu"] + ["cuda"] * cuda
    gpu = "'auto', 'cpu', and 'cuda' where there is a GPU"
    yield "device", settings["device"] in devices, gpu
    for name in PATHS:
        path, to_be_made = settings[name], name == "processed_folder" and settings["raw_data_file"]
        there = isinstance(path, str) and (to_be_made or path == "" or Path(path).exists())
        yield name, there, "'', or a file or folder that exists"
    own = settings["raw_data_file"] or settings["processed_folder"]
    kinds = ["dataset"] if own else ["synthetic", "random"]
    without = "'synthetic' or 'random' without"
    allowed = f"'dataset' with raw_data_file or processed_folder, {without}"
    yield "data_generation", settings["data_generation"] in kinds, allowed
