"""Saved models: a folder that opens to the same model, and every other folder refused."""

import json
import shutil
import types

import pandas as pd
import pytest
import torch

import dlrm_utils
from dlrm_utils import FrameEncoder, load_model, save_model

FRAME = pd.DataFrame({"age": [1.0, 2.0, 4.0], "city": ["Rome", "Oslo", "Rome"]})
SETTINGS = {"embedding_dim": 4, "bottom_mlp": [8], "top_mlp": [8], "num_dense": 1}


def made(notebook, seed=0, city="Rome"):
    """A model of random weights and its encoder."""
    torch.manual_seed(seed)
    encoder = FrameEncoder(["age"], ["city"]).fit(FRAME.replace("Rome", city))
    return notebook.DLRM(encoder.table_sizes, **SETTINGS), encoder


def save(folder, model, encoder):
    save_model(folder, {"class": "DLRM"} | SETTINGS, model, encoder)
    return folder


@pytest.fixture
def folder(notebook, tmp_path):
    return save(tmp_path / "saved", *made(notebook))


def outputs(model, encoder):
    with torch.inference_mode():
        return model(*encoder.transform(FRAME)[:3])


def test_a_saved_model_opens_and_takes_the_place_of_an_older_one(folder, notebook):
    for seed in (0, 1):
        model, encoder = made(notebook, seed)
        save(folder, model, encoder)
        state = torch.get_rng_state()
        loaded, its_encoder = load_model(folder)
        assert torch.equal(torch.get_rng_state(), state) and not loaded.training
        assert torch.equal(outputs(loaded, its_encoder), outputs(model, encoder))
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["settings.json", "weights.pt", "encoder"])
@pytest.mark.parametrize("damage", ["absent", "cut", "of another model"])
def test_a_damaged_folder_is_refused(folder, notebook, tmp_path, name, damage):
    path, other = folder / name, save(tmp_path / "other", *made(notebook, 1, "Bonn"))
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "of another model":
        shutil.copy(other / name, path)
    with pytest.raises(ValueError, match="saved"):
        load_model(folder)


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign"):
        load_model(tmp_path / "foreign")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"format": "version 9"}))
    with pytest.raises(ValueError, match="another version"):
        load_model(folder)


def test_what_is_not_ours_is_kept(folder, notebook, tmp_path):
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (folder, tmp_path / "file"):
        with pytest.raises((ValueError, OSError)):
            save(path, *made(notebook))
    assert (folder / "notes.txt").exists() and (tmp_path / "file").read_text() == "mine"


def test_settings_of_another_model_are_refused_and_the_older_folder_stays(folder, notebook):
    before = outputs(*load_model(folder))
    model, encoder = made(notebook, 1)
    for wrong in ({"embedding_dim": 5}, {"no_such_width": 3}):
        with pytest.raises(ValueError, match="no such model"):
            save_model(folder, {"class": "DLRM"} | SETTINGS | wrong, model, encoder)
    assert torch.equal(outputs(*load_model(folder)), before)
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_what_is_no_model_is_not_called(tmp_path, monkeypatch):
    """A folder from elsewhere may name any function of the notebook."""
    called = []
    monkeypatch.setattr(
        dlrm_utils, "load_notebook", lambda: types.SimpleNamespace(act=called.append)
    )
    with pytest.raises(ValueError, match="no such model as 'act'"):
        dlrm_utils._built({"class": "act"}, [3], tmp_path / "weights.pt")
    assert called == []
