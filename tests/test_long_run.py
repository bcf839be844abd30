"""A long training that is killed again and again ends at the same bits as one that is not."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from dlrm_utils import preprocess_criteo
from kill_target import notebook, run


@pytest.fixture(scope="module")
def processed(toy):
    return str(toy.path)


def saved_at(folder):
    """When the last checkpoint was written, or None."""
    path = Path(folder) / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def step_saved_at(folder):
    """The step of the last checkpoint, 0 without one."""
    path = Path(folder) / "last.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def new_process(*arguments):
    """A process that runs the training. All are forked from one that has loaded torch already."""
    if sys.platform == "win32":
        return multiprocessing.Process(target=run, args=arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_target"])
    return context.Process(target=run, args=arguments)


def killed_runs(processed, folder, kills, seed):
    """Start the training, kill it within three checkpoints, and so on; at last let it finish.

    Returns the step of the last checkpoint after each kill.
    """
    chance, steps = random.Random(seed), []
    for _ in range(kills):
        process = new_process(processed, folder)
        process.start()
        saves, last = chance.randint(1, 3), saved_at(folder)
        while saves and process.is_alive():
            time.sleep(0.002)
            if saved_at(folder) != last:
                saves, last = saves - 1, saved_at(folder)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive()
        process.kill()
        process.join()
        steps.append(step_saved_at(folder))
    process = new_process(processed, folder)
    process.start()
    process.join()
    assert process.exitcode == 0
    return steps


def sums_of_squares(checkpoint):
    return [state["sum"] for state in checkpoint["optimizer"]["state"].values()]


def same_bits(one, other):
    """Are the two checkpoints equal in weights, optimizer state, history and step?"""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    pairs = [*zip(one["model"].values(), other["model"].values(), strict=True)]
    pairs += zip(sums_of_squares(one), sums_of_squares(other), strict=True)
    same_numbers = one["history"] == other["history"] and one["step"] == other["step"]
    return same_numbers and all(torch.equal(a, b) for a, b in pairs)


def same_weights(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.slow  # a fork server that loads torch, and four trainings
def test_three_kills_change_nothing(processed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the fork server looks
    run(processed, tmp_path / "whole")
    steps = killed_runs(processed, str(tmp_path / "killed"), kills=3, seed=0)
    assert 0 < steps[0] < steps[1] < steps[2]  # each went on from where the one before was
    assert same_bits(tmp_path / "whole/last.pt", tmp_path / "killed/last.pt")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["last.pt"]


@pytest.fixture(scope="module")
def whole(processed, tmp_path_factory):
    """The folder, model, history and steps of a training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(processed, folder, batch_size=1000)


@pytest.mark.slow  # 104 steps, five evaluations of them, once and in parts
def test_stopped_anywhere_it_resumes_from_the_last_checkpoint(processed, toy, whole, tmp_path):
    """A call that started over would end at the same bits, but take more steps."""
    _, model, history, steps = whole
    assert steps == 2 * -(-len(toy.train) // 1000)
    assert [step for step, _ in history] == [*range(25, steps, 25), steps]
    stops, done = (3, 30, 75, None, None), (0, 0, 25, 75, steps)
    for stop, before in zip(stops, done, strict=True):
        resumed, again, taken = run(processed, tmp_path, batch_size=1000, stop=stop)
        assert taken == (stop or steps) - before
    assert again == history and same_weights(model, resumed)


@pytest.mark.slow  # as many steps again
def test_what_is_resumed_is_the_checkpoint_and_not_a_new_start(processed, whole, tmp_path):
    """Change what it holds, and the end has to change with it."""
    _, model, _, steps = whole
    run(processed, tmp_path, batch_size=1000, stop=75)
    for part in ("model", "optimizer"):
        checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
        if part == "model":
            checkpoint["model"]["top.0.bias"] += 1
        else:
            for state in checkpoint["optimizer"]["state"].values():
                state["sum"] *= 4
        (tmp_path / part).mkdir()
        torch.save(checkpoint, tmp_path / part / "last.pt")
        resumed, _, taken = run(processed, tmp_path / part, batch_size=1000)
        assert taken == steps - 75 and not same_weights(model, resumed)


def test_other_settings_are_refused(processed, tmp_path):
    run(processed, tmp_path, batch_size=1000, stop=25)
    settings = (
        "last.pt was made with the settings .*'batch_size': 1000.* not with .*'batch_size': 500"
    )
    with pytest.raises(ValueError, match=settings):
        run(processed, tmp_path, batch_size=500)


def small_checkpoint(path):
    """Write a checkpoint of a small model; the model and its optimizer."""
    model = notebook.DLRM([3, 4], 2, [4], [4], num_dense=2)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    notebook.save_checkpoint(path, model, optimizer, step=7)
    return model, optimizer


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("step 7")


def pickled(path):
    """A file that would run code if it were opened as a pickle."""
    torch.save({"step": 7, "model": Path("elsewhere")}, path)


def other_content(path):
    torch.save({"weights": torch.zeros(3)}, path)


def a_list(path):
    torch.save([1, 2, 3], path)


def of_another_model(path):
    other = notebook.DLRM([3, 5], 2, [4], [4], num_dense=2)
    notebook.save_checkpoint(path, other, torch.optim.Adagrad(other.parameters()), step=7)


@pytest.mark.parametrize(
    "spoil", [cut, empty, text, pickled, other_content, a_list, of_another_model]
)
def test_a_cut_or_foreign_checkpoint_is_named_and_what_to_do(tmp_path, spoil):
    path = tmp_path / "last.pt"
    model, optimizer = small_checkpoint(path)
    spoil(path)
    with pytest.raises(ValueError) as caught:
        notebook.load_checkpoint(path, model, optimizer)
    assert str(path) in str(caught.value) and "move it away to start over" in str(caught.value)
    assert path.exists()  # it is the reader who decides


def test_a_whole_checkpoint_comes_back_and_an_absent_one_is_said_to_be(tmp_path):
    model, optimizer = small_checkpoint(tmp_path / "last.pt")
    assert notebook.load_checkpoint(tmp_path / "last.pt", model, optimizer)["step"] == 7
    with pytest.raises(FileNotFoundError):
        notebook.load_checkpoint(tmp_path / "none.pt", model, optimizer)


def test_a_checkpoint_of_other_data_is_refused(processed, toy, tmp_path):
    """The same rows with flipped labels: as many, and of the same tables."""
    run(processed, tmp_path / "run", batch_size=1000, stop=25)
    lines = toy.path.with_suffix(".txt").read_text().splitlines(keepends=True)
    flipped = [("0" if line[0] == "1" else "1") + line[1:] for line in lines]
    (tmp_path / "flipped.txt").write_text("".join(flipped))
    other = tmp_path / "other"
    preprocess_criteo(tmp_path / "flipped.txt", other, min_count=10, progress=False)
    with pytest.raises(ValueError, match="was made with the settings"):
        run(str(other), tmp_path / "run", batch_size=1000, stop=30)
