"""The learning rates of section 10: four rates for each of five models and two optimizers, one epoch each, the same budget for all.

Toy clicks (200,000 rows with small layers; 1,000,000 rows with the paper's, because the best rate changes with the number of rows) and
MovieLens (small layers); log loss on validation rows. Writes figures/measured/learning_rates.csv, which the notebook reads.
"""
import functools
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook_definitions
from movielens_quality import section_12

book = notebook_definitions.load()
os.chdir(notebook_definitions.ROOT)                              # the notebook's functions read from there
MEASURED = Path("figures/measured")
BATCH_SIZE = 256
LAYERS = {"small": ([64], [64]), "paper": ([512, 256, 64], [512, 256])}
NAMES = ["logistic regression", "factorization machine", "plain MLP", "DCN", "DLRM"]
RATES = {("toy", "SGD"): dict(zip(NAMES, [[0.03, 0.1, 0.3, 1], [0.01, 0.03, 0.1, 0.3], [0.1, 0.3, 1, 3], [0.01, 0.03, 0.1, 0.3], [0.1, 0.3, 1, 3]])),
         ("toy", "Adagrad"): dict.fromkeys(NAMES, [0.01, 0.02, 0.04, 0.08]),
         ("MovieLens", "SGD"): dict(zip(NAMES, [[0.3, 1, 3, 10], [0.03, 0.1, 0.3, 1], [0.3, 1, 3, 10], [0.03, 0.1, 0.3, 1], [0.3, 1, 3, 10]])),
         ("MovieLens", "Adagrad"): dict.fromkeys(NAMES, [0.01, 0.02, 0.04, 0.08]) | {NAMES[0]: [0.04, 0.08, 0.16, 0.32]}}
torch.sparse.check_sparse_tensor_invariants.disable()


class Clicks(NamedTuple):
    """What a comparison needs of a data set."""
    table_sizes: list
    get_batch: object
    rows: range
    validation: object
    test: object
    num_dense: int

    def models(self, layers):
        """By name, what makes a new model for these clicks."""
        return {name: functools.partial(new, self.table_sizes, num_dense=self.num_dense)
                for name, new in book.five_models(16, *LAYERS[layers]).items()}


@functools.cache
def clicks_of(data_set):
    """`Clicks` of MovieLens, or of a processed Criteo file given by its path."""
    if data_set == "MovieLens":
        films = section_12()
        train = films["films_train"]
        return Clicks(films["encoder"].table_sizes, train.take, range(len(train.dense)), films["films_choose"], films["films_test"], 2)
    data = book.dlrm_utils.load_criteo(data_set)
    return Clicks(data.table_sizes, data.batch, data.train, data.batch(data.validation[:20_000]), data.batch(data.test), 13)


def in_parallel(function, jobs):
    """function(*job) for each job, one process a core and one core a process; results in the order of jobs."""
    spawn = multiprocessing.get_context("spawn")                 # a forked torch can hang
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        results = [pool.submit(function, *job) for job in jobs]
        return [result.result() for result in book.progress(results, desc="runs", unit="run")]


def validation_loss(data_set, layers, optimizer, name, rate):
    """After one epoch; infinite if training ran away."""
    torch.manual_seed(0)
    clicks = clicks_of(data_set)
    model = clicks.models(layers)[name]()
    book.train(model, clicks.get_batch, clicks.rows, getattr(torch.optim, optimizer)(model.parameters(), lr=rate), BATCH_SIZE)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        return float("inf")
    return round(book.evaluate(model, clicks.validation)["log_loss"], 5)


def main():
    with tempfile.TemporaryDirectory() as folder:
        files = {"small": f"{folder}/200000.npz", "paper": f"{folder}/1000000.npz"}
        for path in map(Path, files.values()):
            book.dlrm_utils.write_toy_criteo(path.with_suffix(".txt"), int(path.stem))
            book.dlrm_utils.preprocess_criteo(path.with_suffix(".txt"), path, min_count=10)
        searches = [(data, optimizer, name, rate) for (data, optimizer), rates in RATES.items() for name in NAMES for rate in rates[name]]
        jobs = [(files["paper"], "paper", *search[1:]) for search in searches if search[0] == "toy"]
        jobs += [(files["small"], "small", *search[1:]) for search in searches if search[0] == "toy"]
        jobs += [("MovieLens", "small", *search[1:]) for search in searches if search[0] == "MovieLens"]
        losses = in_parallel(validation_loss, jobs)
    table = pd.DataFrame(jobs, columns=["data", "layers", "optimizer", "model", "learning_rate"]).assign(log_loss=losses)
    MEASURED.mkdir(exist_ok=True)
    table.replace({"data": dict.fromkeys(files.values(), "toy")}).to_csv(MEASURED / "learning_rates.csv", index=False)
    print(table.groupby(["layers", "data", "model", "optimizer"])["log_loss"].apply(list).to_string())


if __name__ == "__main__":
    main()
