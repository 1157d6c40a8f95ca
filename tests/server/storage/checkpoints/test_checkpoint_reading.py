"""A checkpoint is read as it was written, and found by its name or number."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from server.storage.checkpoint_cases import OWNER, automatic, content, net, saved_model
from server.storage.stored_checkpoints import NAMED, refusal

from gradwire_proto.errors import (
    CheckpointNotFound,
)
from gradwire_server.storage.checkpoint_store import CheckpointStore, key_of
from gradwire_server.storage.manifest import FILES

DATA = Path(__file__).parent.parent / "data"


def test_model_comes_back_as_it_was_saved(storage, segments):
    saved = saved_model(segments)
    written = storage.store.write(NAMED, saved)
    found = storage.opened().read(NAMED)
    assert content(found) == content(saved)
    assert found.torch_version == torch.__version__
    assert (written.name, written.step, written.command, written.automatic) == ("best", 3, 5, False)
    sizes = [storage.files.size(storage.path(NAMED, name)) for name in FILES]
    assert written == storage.store.get(NAMED) and written.nbytes == sum(sizes)


def test_model_without_optimizer_gradients_and_variants_comes_back(storage, segments):
    saved = saved_model(segments)
    state = replace(saved.state, optimizer=None, held=(None, None), opened=(), splits={}, trained=())
    saved = replace(saved, state=state, replies=(), request_id=None)
    storage.store.write(NAMED, saved)
    assert content(storage.store.read(NAMED)) == content(saved)


def test_weights_load_into_the_users_own_module(storage, segments, tmp_path):
    trained, ids = net(1), torch.randint(7, (6, 3))
    storage.store.write(NAMED, saved_model(segments, trained))
    storage.files.get(storage.path(NAMED, "weights.safetensors"), str(tmp_path / "weights.safetensors"))
    fresh = net(2)
    weights = load_file(tmp_path / "weights.safetensors")
    assert list(trained.state_dict().keys() ^ weights.keys()) == []
    fresh.load_state_dict(weights, strict=True)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.eval()(ids), trained.eval()(ids))
    assert all(torch.equal(each, trained.state_dict()[name]) for name, each in fresh.state_dict().items())


def test_parameters_that_safetensors_has_no_type_for_come_back(storage, segments):
    module = torch.nn.Module()
    module.z = torch.nn.Parameter(torch.randn(3, dtype=torch.complex128))
    saved = saved_model(segments, module)
    storage.store.write(NAMED, saved)
    assert content(storage.store.read(NAMED)) == content(saved)


def test_another_torch_is_logged(storage, segments, caplog, monkeypatch):
    monkeypatch.setattr("gradwire_server.storage.manifest.version", lambda _: "1.0")
    storage.store.write(NAMED, saved_model(segments))
    assert storage.store.read(NAMED).torch_version == "1.0"
    assert "under torch 1.0" in caplog.text


def test_files_that_were_read_belong_to_the_reader(storage, segments):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    read = storage.store.read(NAMED)
    assert storage.leftovers()
    read.remove_files()
    read.remove_files()
    assert not storage.leftovers()
    assert content(storage.store.read(NAMED)) == content(saved)


def test_deleting_takes_nothing_from_a_reader(storage, segments):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    read = storage.store.read(NAMED)
    storage.store.delete(NAMED)
    assert content(read) == content(saved)


def test_one_that_is_deleted_while_it_is_read_is_not_found(storage, segments, monkeypatch):
    storage.store.write(NAMED, saved_model(segments))
    fetch = storage.store._folders.fetch

    def too_late(key: str, names: list[str]) -> Path:
        storage.opened().delete(key)
        return fetch(key, names)

    monkeypatch.setattr(storage.store._folders, "fetch", too_late)
    assert isinstance(refusal(lambda: storage.store.read(NAMED)), CheckpointNotFound)
    assert not storage.leftovers()


def test_files_of_a_saved_model_are_removed_with_it(segments):
    saved = saved_model(segments)
    assert any(segments.iterdir())
    saved.remove_files()
    assert not any(segments.iterdir())


def test_first_version_is_still_read(tmp_path):
    shutil.copytree(DATA / "checkpoint-1", tmp_path / "checkpoints")
    found = CheckpointStore(str(tmp_path / "checkpoints"), tmp_path / "cache", owner=OWNER).read("named/first")
    (tmp_path / "segments").mkdir()
    expected = content(saved_model(tmp_path / "segments", name="first"))
    random = {"tensors", "optimizer", "held"}
    seen = content(found)
    assert {name: seen[name] for name in expected.keys() - random} == {
        name: expected[name] for name in expected.keys() - random
    }
    assert {name: tensor[:2] for name, tensor in seen["tensors"].items()} == {
        name: tensor[:2] for name, tensor in expected["tensors"].items()
    }
    assert seen["tensors"]["a_bfloat16"] == expected["tensors"]["a_bfloat16"]
    assert seen["tensors"]["_constant0"] == expected["tensors"]["_constant0"]
    for part in ("param_groups", "schedule", "scaler"):
        assert seen["optimizer"][part] == expected["optimizer"][part]
    assert [held and held.keys() for held in found.state.held] == [{"embed.weight", "scale"}, None]
    assert not any(each.own_statistics for each in found.state.splits.values())


def test_newest_is_that_of_the_highest_number(storage, segments):
    assert storage.store.newest("digits") is None
    for number in (0, 10, 9):
        storage.store.write(f"auto/digits/{number}", automatic(segments, number))
    storage.store.write("auto/digits2/99", automatic(segments, 99, "digits2"))
    assert storage.store.newest("digits") == "auto/digits/10"
    assert storage.store.automatic("digits") == [10, 9, 0]


def test_list_has_what_starts_so(storage, segments):
    assert storage.store.list() == []
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("auto/digits/4", automatic(segments, 4))
    storage.store.write("auto/digits2/5", automatic(segments, 5, "digits2"))
    assert [each.name for each in storage.store.list()] == ["digits/4", "digits2/5", "best"]
    assert [each.name for each in storage.store.list("named/")] == ["best"]
    assert [each.name for each in storage.store.list("auto/digits/")] == ["digits/4"]
    assert [key_of(each.name) for each in storage.store.list()] == ["auto/digits/4", "auto/digits2/5", NAMED]


def test_what_was_deleted_is_gone(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    storage.store.delete(NAMED)
    assert storage.store.list() == [] and not storage.leftovers()
    storage.store.write(NAMED, saved_model(segments, step=8))
    assert storage.store.get(NAMED).step == 8


def test_automatic_ones_go_with_their_model(storage, segments):
    for number in (0, 4):
        storage.store.write(f"auto/digits/{number}", automatic(segments, number))
    storage.store.write("auto/digits2/5", automatic(segments, 5, "digits2"))
    storage.store.write(NAMED, saved_model(segments))
    storage.store.delete_automatic("digits")
    assert [each.name for each in storage.store.list()] == ["digits2/5", "best"]
