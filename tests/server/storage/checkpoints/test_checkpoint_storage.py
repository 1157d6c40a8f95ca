"""Storages of checkpoints that fail, or that several services share."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

from server.storage.checkpoint_cases import automatic, content, saved_model
from server.storage.stored_checkpoints import NAMED, refusal

from gradwire_proto.errors import (
    FailedPrecondition,
    ResourceExhausted,
)
from gradwire_server.storage import checkpoint_store, local_folders
from gradwire_server.storage.checkpoint_store import CheckpointStore, key_of
from gradwire_server.storage.manifest import FILES
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.temporary_checkpoints import remove_automatic_checkpoints


def test_full_disk_is_told_and_leaves_nothing(local, segments):
    saved = saved_model(segments)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file of more bytes than this is refused by the system, as one for which there is no room.
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, whole[1]))
    try:
        error = refusal(lambda: local.store.write(NAMED, saved))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert isinstance(error, ResourceExhausted) and error.reason == "STORAGE_FULL" and error.outcome == "not_applied"
    assert local.store.list() == [] and not local.leftovers()
    local.store.write(NAMED, saved)
    assert content(local.store.read(NAMED)) == content(saved)


def test_read_only_folder_is_told(local, segments, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    saved = saved_model(segments)
    with monkeypatch.context() as patch:
        # Root, as whom tests may run, writes wherever modes forbid it.
        patch.setattr(local_folders.os, "open", refuse)
        error = refusal(lambda: local.store.write(NAMED, saved))
    assert isinstance(error, FailedPrecondition) and error.reason == "STORAGE_READ_ONLY"
    assert not local.leftovers()


def test_everything_is_on_the_disk_before_it_is_shown(local, segments, monkeypatch):
    order: list[tuple[str, Any]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        order.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recorded_rename(source: Any, target: Any) -> None:
        order.append(("rename", {path.stat().st_ino: path.name for path in [source, *Path(source).iterdir()]}))
        rename(source, target)

    monkeypatch.setattr(local_folders.os, "fsync", recorded_fsync)
    monkeypatch.setattr(local_folders.os, "rename", recorded_rename)
    local.store.write(NAMED, saved_model(segments))
    (at,) = [index for index, (what, _) in enumerate(order) if what == "rename"]
    flushed = {inode for _, inode in order[:at]}
    assert order[at][1].keys() <= flushed and len(order[at][1]) == len(FILES) + 2
    assert {each for _, each in order[at + 1 :]} >= {(Path(local.root) / "named").stat().st_ino}


def test_nothing_is_shown_or_removed_by_a_service_that_was_taken_over_from(storage, segments):
    def fenced() -> None:
        raise FailedPrecondition("another service has taken over", reason="MODEL_FENCED")

    storage.store.write(NAMED, saved_model(segments))
    old = storage.opened(fence=fenced)
    assert refusal(lambda: old.write("named/other", saved_model(segments))).reason == "MODEL_FENCED"
    assert refusal(lambda: old.delete(NAMED)).reason == "MODEL_FENCED"
    assert [each.name for each in storage.store.list()] == ["best"]


def test_what_the_new_service_swept_the_old_one_cannot_show(local, segments, monkeypatch):
    old = local.opened(fence=lambda: local.opened().sweep())
    assert refusal(lambda: old.write(NAMED, saved_model(segments))).reason == "MODEL_FENCED"
    assert local.store.list() == []


def test_file_system_without_links_is_read_all_the_same(local, segments, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(local_folders.os, "link", refuse)
    saved = saved_model(segments)
    local.store.write(NAMED, saved)
    assert content(local.store.read(NAMED)) == content(saved)


def test_services_share_named_checkpoints_and_leave_each_others_automatic_ones_alone(storage, segments):
    other = storage.opened(owner="fedcba9876543210")
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("auto/digits/4", automatic(segments, 4))
    other.sweep()
    assert [each.name for each in other.list()] == ["best"] and other.automatic("digits") == []
    other.write("auto/digits/4", automatic(segments, 4, step=9))
    other.delete_automatic("digits")
    other.write("auto/digits/5", automatic(segments, 5))
    assert storage.store.automatic("digits") == [4] and storage.store.get("auto/digits/4").step == 3
    assert refusal(lambda: other.write(NAMED, saved_model(segments, request_id=None))).reason == "CHECKPOINT_EXISTS"
    other.delete(NAMED)
    assert [key_of(each.name) for each in storage.store.list()] == ["auto/digits/4"]


def test_what_another_service_is_writing_or_reading_is_not_swept(storage, segments, monkeypatch):
    other = CheckpointStore(storage.url, storage.folder / "cache of the other", owner="fedcba9876543210")
    write, check = checkpoint_store.write_files, checkpoint_store.check_file

    def written(draft, saved):
        files = write(draft, saved)
        other.sweep()
        return files

    def checked(*arguments):
        other.sweep()
        check(*arguments)

    monkeypatch.setattr(checkpoint_store, "write_files", written)
    monkeypatch.setattr(checkpoint_store, "check_file", checked)
    for key, saved in ((NAMED, saved_model(segments)), ("auto/digits/4", automatic(segments, 4))):
        storage.store.write(key, saved)
        assert content(storage.store.read(key)) == content(saved)


def test_storage_that_goes_takes_its_automatic_checkpoints_along_and_no_others(storage, segments, tmp_path):
    place = tmp_path / "temporary"
    lock = StorageLock.take(place, 0.0)
    own = storage.opened(owner=lock.storage_id)
    lock.release()
    own.write("auto/digits/4", automatic(segments, 4))
    own.write(NAMED, saved_model(segments))
    storage.store.write("auto/digits/5", automatic(segments, 5))
    remove_automatic_checkpoints(place, storage.url, 10.0)
    assert own.automatic("digits") == [] and own.get(NAMED).name == "best"
    assert storage.store.read("auto/digits/5").state.command == 5
    assert not [path for path in storage.files.find(storage.root, withdirs=True) if path.endswith(lock.storage_id)]
