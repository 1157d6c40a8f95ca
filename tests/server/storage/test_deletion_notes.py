"""Which requests have deleted something: for an hour, and no longer."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage import deletion_notes
from gradwire_server.storage.deletion_notes import KEEP_SECONDS, DeletionNotes
from gradwire_server.storage.saved_model import StoredReply
from gradwire_server.storage.storage_lock import StorageLock


def note(name: str, ended_at: float) -> StoredReply:
    return StoredReply(
        number=0, request_id=name, body=name.encode(), method="DeleteModel", reply=b"", ended_at=ended_at
    )


@pytest.fixture
def now(monkeypatch: Any) -> list[float]:
    time = [1e9]
    monkeypatch.setattr(deletion_notes, "time", SimpleNamespace(time=lambda: time[0]))
    return time


def test_notes_are_there_again_oldest_first_until_they_are_an_hour_old(
    lock: StorageLock, storage: Path, now: list[float]
) -> None:
    notes = DeletionNotes(lock)
    assert notes.open() == ()
    for name in ("b", "a"):
        now[0] += 1
        notes.write(note(name, now[0]))
    assert DeletionNotes(lock).open() == (note("b", 1e9 + 1), note("a", 1e9 + 2))
    now[0] += KEEP_SECONDS - 0.5
    assert DeletionNotes(lock).open() == (note("a", 1e9 + 2),)
    assert os.listdir(storage / "deletions") == ["a.bin"]


def test_notes_that_are_too_old_go_while_others_are_written(lock: StorageLock, storage: Path, now: list[float]) -> None:
    DeletionNotes(lock).open()
    DeletionNotes(lock).write(note("first", now[0]))
    notes = DeletionNotes(lock)
    notes.open()
    for name in ("second", "third"):
        now[0] += KEEP_SECONDS + 1
        notes.write(note(name, now[0]))
        assert os.listdir(storage / "deletions") == [f"{name}.bin"]


def test_note_that_is_cut_off_is_removed(lock: StorageLock, storage: Path, now: list[float]) -> None:
    notes = DeletionNotes(lock)
    notes.open()
    notes.write(note("a", now[0]))
    path = storage / "deletions" / "a.bin"
    path.write_bytes(path.read_bytes()[:-3])
    assert DeletionNotes(lock).open() == () and not path.exists()


def test_frontend_that_was_taken_over_from_notes_nothing(lock: StorageLock, storage: Path) -> None:
    notes = DeletionNotes(lock)
    notes.open()
    (storage / "other").write_text("100\n")
    os.replace(storage / "other", storage / "epoch")
    with pytest.raises(FailedPrecondition, match="another frontend"):
        notes.write(note("a", 1e9))
