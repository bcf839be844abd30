"""Saved models: a folder that opens to the same model, and every other folder refused."""

import multiprocessing
import os
import pickle
import shutil
import sys
import zipfile

import pandas as pd
import pytest
import torch

import dlrm_models
from data import files
from dlrm_models import load_model, save_model
from dlrm_utils import FrameEncoder

FRAME = pd.DataFrame(
    {
        "age": [1.0, 2.0, 4.0],
        "city": ["Rome", "Oslo", "Rome"],
        "liked": [["Alien"], [], ["Alien", "Up"]],
    }
)
SETTINGS = {"embedding_dim": 4, "bottom_mlp": [8], "top_mlp": [8], "num_dense": 1}
KEPT = {"settings.json", ".lock"}


def made(notebook, seed=0, city="Rome", **more):
    """A model of random weights and its encoder."""
    torch.manual_seed(seed)
    encoder = FrameEncoder(["age"], ["city"], ["liked"]).fit(FRAME.replace("Rome", city))
    return notebook.DLRM(encoder.table_sizes, **SETTINGS, **more), encoder


def save(folder, model, encoder, **more):
    save_model(folder, {"class": "DLRM"} | SETTINGS | more, model, encoder)
    return folder


@pytest.fixture
def folder(notebook, tmp_path):
    return save(tmp_path / "saved", *made(notebook))


def outputs(model, encoder):
    with torch.inference_mode():
        return model(*encoder.transform(FRAME)[:3])


def assert_tidy(folder):
    """Nothing but one model lies in a folder, and nothing beside it."""
    names = {path.name for path in folder.iterdir()}
    assert names >= {"settings.json"} and len(names - KEPT) == 1, names
    assert folder.name in {path.name for path in folder.parent.iterdir()}


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_saved_model_opens_and_takes_the_place_of_an_older_one(folder, notebook):
    for seed in (0, 1):
        model, encoder = made(notebook, seed)
        model.train()
        save(folder, model, encoder)
        assert model.training
        state = torch.get_rng_state()
        loaded, its_encoder = load_model(folder)
        assert torch.equal(torch.get_rng_state(), state) and not loaded.training
        assert torch.equal(outputs(loaded, its_encoder), outputs(model, encoder))
        assert_tidy(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_what_was_loaded_can_be_saved_over_itself_and_used_on(folder, notebook):
    model, encoder = load_model(folder)
    before = outputs(model, encoder)
    fresh, its_encoder = load_model(folder)  # has read no name yet
    save(folder, fresh, its_encoder)
    assert torch.equal(outputs(fresh, its_encoder), before)
    assert torch.equal(outputs(*load_model(folder)), before)


# ---- No model changes silently into another ----


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_form_of_the_bottom_mlp_travels_and_the_other_is_refused(
    notebook, tmp_path, published, seed
):
    """A ReLU has no weights: both forms have the same state."""
    model, encoder = made(notebook, seed, relu_after_bottom=published)
    folder = save(tmp_path / "right", model, encoder, relu_after_bottom=published)
    assert torch.equal(outputs(*load_model(folder)), outputs(model, encoder))
    with pytest.raises(ValueError, match="another model"):
        save(tmp_path / "wrong", model, encoder, relu_after_bottom=not published)
    assert not (tmp_path / "wrong").exists()


def test_a_dead_bottom_mlp_does_not_hide_the_form(notebook, tmp_path):
    """Its outputs are all below 0: a ReLU makes them nothing, its absence does not."""
    model, encoder = made(notebook, relu_after_bottom=True)
    last = [layer for layer in model.bottom if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.fill_(-1000.0)
    with pytest.raises(ValueError, match="another model"):
        save(tmp_path / "saved", model, encoder)


def test_what_is_done_to_a_class_is_no_secret(notebook, tmp_path):
    """A class of the same name that pools otherwise has the same state, too."""
    model, encoder = made(notebook)

    class DLRM(notebook.DLRM):
        def combine(self, dense_vector, looked_up):
            return super().combine(dense_vector, 2 * looked_up)

    other = DLRM(encoder.table_sizes, **SETTINGS)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="another model"):
        save(tmp_path / "saved", other, encoder)


def test_settings_of_another_model_are_refused_and_the_older_folder_stays(folder, notebook):
    before = outputs(*load_model(folder))
    model, encoder = made(notebook, 1)
    for wrong in ({"embedding_dim": 5}, {"no_such_width": 3}):
        with pytest.raises(ValueError, match="no such DLRM"):
            save(folder, model, encoder, **wrong)
    assert torch.equal(outputs(*load_model(folder)), before)
    assert_tidy(folder)


# ---- Folders that are not what they should be ----


@pytest.mark.parametrize("damage", ["absent", "cut", "of another model"])
def test_a_damaged_folder_is_refused(folder, notebook, tmp_path, damage):
    other = save(tmp_path / "other", *made(notebook, 1, "Bonn"))
    assert len(files_in(folder)) == len(files_in(other)) > 3
    for path, another in zip(files_in(folder), files_in(other), strict=True):
        content = path.read_bytes()
        if damage == "absent":
            path.unlink()
        else:
            path.write_bytes(content[:-9] if damage == "cut" else another.read_bytes())
        if path.read_bytes() != content if path.exists() else True:
            with pytest.raises(ValueError, match="saved"):
                outputs(*load_model(folder))
        path.write_bytes(content)
    assert load_model(folder)


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign"):
        load_model(tmp_path / "foreign")
    settings = files.read_json(folder / "settings.json", dlrm_models.MODEL_VERSION)
    files.write_json(folder / "settings.json", "version 9", settings)
    with pytest.raises(ValueError, match="another version"):
        load_model(folder)


def test_what_is_not_ours_is_kept(folder, notebook, tmp_path):
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (folder, tmp_path / "file"):
        with pytest.raises((ValueError, OSError)):
            save(path, *made(notebook))
    assert (folder / "notes.txt").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["system", "torch", "nn", "fit", "no_such_name"])
def test_what_is_no_model_is_not_called(folder, name):
    """A folder from elsewhere may name any function of the notebook."""
    settings = files.read_json(folder / "settings.json", dlrm_models.MODEL_VERSION)
    settings["model"] = {"class": name}
    files.write_json(folder / "settings.json", dlrm_models.MODEL_VERSION, settings)
    with pytest.raises(ValueError, match=f"no such model as '{name}'"):
        load_model(folder)


def test_weights_that_would_run_code_are_refused(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("pwned",)

    settings = files.read_json(folder / "settings.json", dlrm_models.MODEL_VERSION)
    (weights,) = folder.rglob("weights.pt")
    with zipfile.ZipFile(weights) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith("data.pkl"))
    with zipfile.ZipFile(weights, "a") as packed, pytest.warns(UserWarning, match="Duplicate"):
        packed.writestr(name, pickle.dumps(Payload()))
    settings["weights"] = files.file_hash(weights)
    files.write_json(folder / "settings.json", dlrm_models.MODEL_VERSION, settings)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_model(folder)
    assert not os.path.exists("pwned")


# ---- Old or new, always whole ----


def test_a_link_stays_a_link(notebook, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk", target_is_directory=True)
    for seed in (0, 1):
        model, encoder = made(notebook, seed)
        save(link, model, encoder)
        assert link.is_symlink()
        assert torch.equal(outputs(*load_model(tmp_path / "disk")), outputs(model, encoder))
    assert_tidy(tmp_path / "disk")


@pytest.mark.parametrize("path", ["run[1]", "a*b", "x?", "."])
def test_no_path_is_a_pattern(notebook, tmp_path, monkeypatch, path):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    save(tmp_path / "inner/run1", *made(notebook, 5, "Bonn")) if path != "." else None
    model, encoder = made(notebook)
    save(path, model, encoder)
    assert torch.equal(outputs(*load_model(path)), outputs(model, encoder))


@pytest.fixture(scope="module")
def start():
    """start(job, *arguments): another process; all are forks of one that imported this file."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["test_saved_models"])

    def start(job, *arguments):
        process = forks.Process(target=job, args=arguments)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # what the server starts with
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        start(int).join()
    return start


def save_and_die(folder, seed, city, step, before):
    """Save, and be gone just before or after a step: nothing is tidied up."""
    real = getattr(dlrm_models, step)

    def dying(*arguments):
        if not before:
            real(*arguments)
        os._exit(9)

    setattr(dlrm_models, step, dying)
    save(folder, *made(dlrm_models.load_notebook(names=["DLRM"]), seed, city))


# Waits for a server of processes, some five seconds.
@pytest.mark.slow
@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(
    "step, before, now",
    [("file_hash", True, "old"), ("flush", True, "old"), ("flush", False, "old")]
    + [("write_json", True, "old"), ("write_json", False, "new")],
)
def test_killed_at_any_step_the_folder_holds_the_old_or_the_new_model(
    notebook, start, tmp_path, older, step, before, now
):
    folder, old, new = tmp_path / "saved", made(notebook, 0), made(notebook, 1, "Bonn")
    if older:
        save(folder, *old)
    process = start(save_and_die, folder, 1, "Bonn", step, before)
    process.join(30)
    assert process.exitcode == 9
    if now == "new" or older:
        expected = outputs(*(new if now == "new" else old))
        assert torch.equal(outputs(*load_model(folder)), expected)
    else:
        with pytest.raises(ValueError, match="no whole saved model"):
            load_model(folder)
    save(folder, *old)
    assert torch.equal(outputs(*load_model(folder)), outputs(*old))
    assert_tidy(folder)


def save_often(folder, seed, city):
    pair = made(dlrm_models.load_notebook(names=["DLRM"]), seed, city)
    for _ in range(8):
        save(folder, *pair)


# Two processes save sixteen times in all, which takes six seconds.
@pytest.mark.slow
def test_two_savers_and_a_reader_see_whole_models_only(notebook, start, tmp_path):
    folder, pairs = tmp_path / "saved", [made(notebook, 0), made(notebook, 1, "Bonn")]
    save(folder, *pairs[0])
    expected = [outputs(*pair) for pair in pairs]
    savers = [start(save_often, folder, *each) for each in ((0, "Rome"), (1, "Bonn"))]
    seen = 0
    while any(saver.is_alive() for saver in savers) or seen == 0:
        found = outputs(*load_model(folder))
        assert any(torch.equal(found, each) for each in expected)
        seen += 1
    assert [saver.exitcode for saver in savers] == [0, 0] and seen > 3
    assert_tidy(folder)


def test_a_copy_of_the_folder_opens(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere/copy")
    shutil.rmtree(folder)
    assert load_model(tmp_path / "elsewhere/copy")[0]
