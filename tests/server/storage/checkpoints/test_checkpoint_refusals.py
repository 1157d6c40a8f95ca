"""Checkpoints that are damaged, taken, or not there are refused by name."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
from server.storage.checkpoint_cases import automatic, content, saved_model
from server.storage.stored_checkpoints import NAMED, refusal

from gradwire_proto.errors import (
    AlreadyExists,
    CheckpointNotFound,
    InvalidArgument,
)
from gradwire_server.storage.manifest import FILES, MANIFEST


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_missing_cut_or_changed_is_named(storage, segments, name):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    path = storage.path(NAMED, name)
    whole = storage.files.cat_file(path)
    damages = [None, whole[:-1], whole + b"\0"]
    for position in {0, len(whole) // 2, len(whole) - 1} if whole else ():
        damages.append(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    for damage in damages:
        if damage is None:
            storage.files.rm_file(path)
        else:
            storage.files.pipe_file(path, damage)
        error = refusal(lambda: storage.store.read(NAMED))
        assert error.reason == "CHECKPOINT_CORRUPT" and name in str(error) and "best" in str(error)
        assert not storage.leftovers()
        storage.files.pipe_file(path, whole)
    assert content(storage.store.read(NAMED)) == content(saved)


def test_damaged_manifest_is_refused_and_not_listed(storage, segments, caplog):
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("named/other", saved_model(segments, name="other"))
    path = storage.path(NAMED, MANIFEST)
    storage.files.pipe_file(path, storage.files.cat_file(path).replace(b'"step": 3', b'"step": 4'))
    assert refusal(lambda: storage.store.read(NAMED)).reason == "CHECKPOINT_CORRUPT"
    assert [each.name for each in storage.store.list()] == ["other"]
    assert "manifest.json" in caplog.text


def test_another_version_is_refused(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    path = storage.path(NAMED, MANIFEST)
    storage.files.pipe_file(path, storage.files.cat_file(path).replace(b'"version": 1', b'"version": 7', 1))
    assert refusal(lambda: storage.store.read(NAMED)).reason == "CHECKPOINT_VERSION"
    assert refusal(lambda: storage.store.get(NAMED)).reason == "CHECKPOINT_VERSION"


@pytest.mark.parametrize("act", ["read", "get", "delete"])
def test_checkpoint_that_is_not_there_is_not_found(storage, segments, act):
    for _ in range(2):
        error = refusal(lambda: getattr(storage.store, act)(NAMED))
        assert isinstance(error, CheckpointNotFound) and error.resource == "checkpoints/best"
        # Another one being there changes nothing.
        storage.store.write(f"named/{secrets.token_hex(4)}", saved_model(segments))


@pytest.mark.parametrize(
    "key", ["named/../best", "named/a/b", "auto/digits", "auto/../1", "auto/a/../1", "x/y", "named/"]
)
def test_key_that_leads_elsewhere_is_refused(storage, key):
    with pytest.raises(ValueError):
        storage.store.read(key)


def test_name_that_is_taken_is_refused(storage, segments):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    for request_id in (None, "00000000-0000-4000-8000-000000000002"):
        error = refusal(lambda: storage.store.write(NAMED, replace(saved_model(segments), request_id=request_id)))  # noqa: B023
        assert isinstance(error, AlreadyExists) and error.reason == "CHECKPOINT_EXISTS"
    assert content(storage.store.read(NAMED)) == content(saved)


def test_repeat_of_the_request_gets_the_first_answer(storage, segments):
    first = storage.store.write(NAMED, saved_model(segments))
    again = saved_model(segments, step=9, created_at=1_800_000_000.0)
    assert storage.opened().write(NAMED, again) == first
    assert storage.opened().answered(NAMED, "digits", again.request_id) == first
    assert storage.store.answered("named/other", "digits", again.request_id) is None


def test_request_id_of_another_models_request_is_refused(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    error = refusal(lambda: storage.store.write(NAMED, saved_model(segments, model_id="letters")))
    assert isinstance(error, InvalidArgument) and error.reason == "REQUEST_ID_REUSED"


def test_automatic_one_takes_the_place_of_one_with_its_number(storage, segments):
    storage.store.write("auto/digits/4", automatic(segments, 4, step=1))
    storage.store.write("auto/digits/4", automatic(segments, 4, step=2))
    assert storage.store.read("auto/digits/4").state.step == 2
    storage.store.read("auto/digits/4").remove_files()
