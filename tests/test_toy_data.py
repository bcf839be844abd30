"""The toy clicks: their file, their truth recomputed pair by pair, and what is planted in them."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from conftest import ROOT
from data.criteo import CRITEO_KAGGLE_TABLE_SIZES, NUM_TABLES
from data.files import MISSING
from data.toy_clicks import ToyTruth, toy_codes, write_toy_criteo


def read_slowly(path):
    return [line.rstrip("\n").split("\t") for line in path.read_text(encoding="ascii").splitlines()]


def test_the_file_has_criteos_form(tmp_path):
    probabilities = write_toy_criteo(tmp_path / "toy.txt", 3_000)
    rows = read_slowly(tmp_path / "toy.txt")
    assert probabilities.shape == (3_000,) and len(rows) == 3_000
    for fields in rows:
        assert len(fields) == 40 and fields[0] in "01"
        assert all(x == "" or -(2**31) < int(x) < 2**31 for x in fields[1:14])
        assert all(
            x == "" or (len(x) == 8 and x == x.lower() and int(x, 16) >= 0) for x in fields[14:]
        )
    assert any(
        int(fields[2]) < 0 for fields in rows if fields[2]
    )  # as in Criteo, the second integer
    assert [path.name for path in tmp_path.iterdir()] == ["toy.txt"]


def test_same_seed_same_file_and_a_longer_file_starts_with_the_shorter(tmp_path):
    for name, rows, seed in [
        ("a", 500, 0),
        ("b", 500, 0),
        ("longer", 21_000, 0),
        ("other", 500, 1),
    ]:
        write_toy_criteo(tmp_path / name, rows, seed)
    text = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (
        text["a"] == text["b"]
        and text["longer"].startswith(text["a"])
        and text["other"] != text["a"]
    )


def test_the_rows_of_seed_0_are_those_of_the_stored_measurements(tmp_path):
    probabilities = write_toy_criteo(tmp_path / "toy.txt", 41_000)
    assert (
        hashlib.sha256((tmp_path / "toy.txt").read_bytes()).hexdigest()
        == "1e75ba0f8a3ecb602b62b60e61e27c18fa85be6ca231e301f663022497fc2237"
    )
    assert (
        hashlib.sha256(probabilities.round(9).tobytes()).hexdigest()
        == "da514acdfd0a8eed21aec695e1ed3e713b453dcc8f2464a486afc8996f53d8a8"
    )


def test_the_truth_pair_by_pair():
    truth = ToyTruth(seed=3)
    dense, ranks = truth.draw(np.random.default_rng(0), 50)
    for n, logit in enumerate(truth.logit(dense, ranks)):
        z = [
            max(-3, min(3, (math.log1p(max(x, 0)) - mean) / std))
            for x, mean, std in zip(dense[n].tolist(), truth.mean, truth.std, strict=True)
        ]
        loudness = [1 / (1 + max(rank, 0) / 10) for rank in ranks[n].tolist()]
        slow = truth.bias + sum(
            weight * x for weight, x in zip(truth.dense_weights, z, strict=True)
        )
        slow += sum(truth.effects[j][ranks[n, j] % 1024] * loudness[j] for j in range(26))
        vectors = [sum(x * row for x, row in zip(z, truth.dense_projection, strict=True))]
        vectors += [truth.vectors[j][ranks[n, j] % 1024] * loudness[j] for j in truth.fields]
        for j in range(6):
            for k in range(j):
                slow += truth.signs[j, k] * sum(
                    a * b for a, b in zip(vectors[j], vectors[k], strict=True)
                )
        assert math.isclose(slow, logit, rel_tol=1e-4, abs_tol=1e-4)


def test_numbers_are_standardised():
    truth = ToyTruth(seed=3)
    dense, _ = truth.draw(np.random.default_rng(0), 50_000)
    z = (np.log1p(np.where(dense < 0, 0, dense)) - truth.mean) / truth.std
    assert np.allclose(z.mean(0), 0, atol=0.02) and np.allclose(z.std(0), 1, atol=0.02)


def test_a_missing_or_negative_count_acts_as_0_does():
    truth = ToyTruth()
    dense, ranks = truth.draw(np.random.default_rng(0), 1_000)
    expected = truth.logit(np.maximum(dense, 0), ranks)
    assert (dense == MISSING).any() and ((dense < 0) & (dense != MISSING)).any()
    assert np.array_equal(truth.logit(dense, ranks), expected)


def test_a_perfect_reader_of_the_batch_reaches_the_best_possible_score(toy):
    """It sees dense numbers and ids, and guesses an unknown name as the training rows have them."""
    truth, rng, test = ToyTruth(), np.random.default_rng(0), toy.test
    ranks = ranks_in(toy.path.with_suffix(".txt"))
    train_ids, train_ranks = toy.sparse[: toy.train.stop], ranks[: toy.train.stop]
    batch = toy.batch(test)
    counts = np.expm1(batch.dense.double().numpy())
    expected = 0
    for _ in range(8):
        read = np.empty((len(test), NUM_TABLES), int)
        for column, ids in enumerate(batch.indices):
            known = np.zeros(toy.table_sizes[column], int)
            known[train_ids[:, column]] = train_ranks[:, column]
            unknown = train_ranks[train_ids[:, column] == 0, column]
            guesses = rng.choice(unknown, len(ids)) if len(unknown) else known[0]
            read[:, column] = np.where(ids == 0, guesses, known[ids])
        expected += 1 / (1 + np.exp(-truth.logit(counts, read))) / 8
    places = slice(test.start, test.stop)
    knowing = 1 / (1 + np.exp(-truth.logit(toy.dense[places], ranks[places])))
    assert abs(log_loss(batch.labels, expected) - log_loss(batch.labels, knowing)) < 0.001


def ranks_in(path):
    """The category ranks (rows, 26) of a toy file, -1 where missing."""
    back = pow(2654435761, -1, 2**32)
    texts = np.array([fields[14:] for fields in read_slowly(path)])
    codes = np.vectorize(lambda text: int(text or "0", 16))(texts)
    shift = toy_codes(np.full((1, NUM_TABLES), -1))  # the code of rank -1
    return np.where(texts == "", -1, (codes - shift) * back % 2**32 - 1)


def test_base_rate_tails_and_labels(tmp_path):
    rows = 40_000
    probabilities = write_toy_criteo(tmp_path / "toy.txt", rows)
    labels = np.array([int(fields[0]) for fields in read_slowly(tmp_path / "toy.txt")])
    spread = (
        math.sqrt((probabilities * (1 - probabilities)).sum()) / rows
    )  # of the mean of such coin flips
    assert abs(probabilities.mean() - 0.256) < 0.01
    assert abs(labels.mean() - probabilities.mean()) < 4 * spread
    base_rate = labels.mean()
    assert log_loss(labels, probabilities) < log_loss(labels, np.full(rows, base_rate)) - 0.1
    assert 0.85 < roc_auc_score(labels, probabilities) < 0.92


def test_columns_have_long_tails_within_the_published_sizes():
    _, ranks = ToyTruth().draw(np.random.default_rng(0), 50_000)
    for j, size in enumerate(CRITEO_KAGGLE_TABLE_SIZES):
        present = ranks[ranks[:, j] >= 0, j]
        assert present.max() < size
        counts = np.bincount(present)
        assert counts[0] == counts.max() and counts[0] > 0.05 * len(
            present
        )  # a few names cover much
        if size > 100_000:  # and most names are rare
            assert (counts == 1).sum() > 0.5 * (counts > 0).sum()


@pytest.mark.slow
def test_codes_of_a_column_are_distinct():
    codes = toy_codes(np.repeat(np.arange(400_000)[:, None], 26, axis=1))
    assert codes.min() >= 0 and codes.max() < 2**32
    assert [len(np.unique(column)) for column in codes.T] == [400_000] * 26


def test_without_signal_every_row_has_the_base_rate(tmp_path):
    probabilities = write_toy_criteo(tmp_path / "control.txt", 5_000, signal=False)
    assert np.ptp(probabilities) == 0 and abs(probabilities[0] - 0.256) < 1e-6


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        write_toy_criteo(tmp_path / "toy.txt", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # a process of its own, with its imports
def test_the_command_writes_what_the_function_does(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "data.toy_clicks", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    by_command, by_function = tmp_path / "new folder/a.txt", tmp_path / "b.txt"
    done = run(by_command, "--rows", 500, "--seed", 4, "--no-signal")
    assert done.returncode == 0 and done.stdout.startswith("500 rows in "), done.stderr
    write_toy_criteo(by_function, 500, seed=4, signal=False)
    assert by_command.read_bytes() == by_function.read_bytes()
    refused = run(tmp_path / "c.txt", "--rows", 0)
    assert refused.returncode == 1 and "at least one row" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "c.txt").exists()
