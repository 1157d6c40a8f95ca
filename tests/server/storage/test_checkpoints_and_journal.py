"""Checkpoints and the journal together: whatever one of them loses, the other makes up for."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from server.storage.checkpoint_cases import OWNER, automatic, content, saved_model

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpointer import Checkpointer
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.storage.storage_lock import StorageLock


class Model:
    """A model whose state is its number, with a journal of its own."""

    model_id = "digits"
    retains = False

    def __init__(self, journal: Journal, segments: Path, entry: Callable[..., Entry]) -> None:
        self.number = 0
        self.journal = journal
        self._segments = segments
        self._entry = entry

    def command(self) -> None:
        entry = self._entry(self.number + 1)
        self.journal.reserve(100)
        self.journal.append(entry)
        self.number += 1

    def capture(self, *, automatic: bool) -> Awaitable[SavedModel | None]:
        number = self.number

        async def work() -> SavedModel:
            return saved_model(self._segments, command=number)

        return work()


async def take(checkpointer: Checkpointer, model: Model) -> None:
    """Have the checkpoint taken that is due, and what it replaces dropped."""
    checkpointer.applied()
    while checkpointer.newest < model.number or checkpointer._background is not None:
        await asyncio.sleep(0.001)


@pytest.fixture
def store(storage: Path, lock: StorageLock, tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(storage / "checkpoints"), tmp_path / "cache", owner=OWNER, fence=lock.check)


@pytest.fixture
def segments(tmp_path: Path) -> Path:
    folder = tmp_path / "segments"
    folder.mkdir()
    return folder


async def test_model_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    store, storage, segments, open_journal, entry
):
    journal, _ = open_journal()
    model = Model(journal, segments, entry)
    policy = CheckpointPolicy(commands=1, journal_bytes=10**9, seconds=10**6, keep=2)
    checkpointer = Checkpointer(model, store, policy)
    for number in (0, 3, 6, 9):
        while model.number < number:
            model.command()
        await take(checkpointer, model)
    model.command()
    journal.close()
    assert store.automatic("digits") == [9, 6]
    damaged = storage / f"checkpoints/auto/{OWNER}/digits/9/weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])

    with pytest.raises(FailedPrecondition):
        store.read("auto/digits/9")
    assert store.read("auto/digits/6").state.command == 6
    _, entries = open_journal(6)
    assert [each.number for each in entries] == [7, 8, 9, 10]


async def test_journal_is_cut_behind_checkpoints(store, storage, segments, model, open_journal, entry):
    journal, _ = open_journal()
    hosted = Model(journal, segments, lambda number: entry(number, 90))
    policy = CheckpointPolicy(commands=1, journal_bytes=10**9, seconds=10**6, keep=2)
    checkpointer = Checkpointer(hosted, store, policy)
    sizes = []
    for number in range(0, 200, 10):
        while hosted.number < number:
            hosted.command()
        await take(checkpointer, hosted)
        sizes.append(sum(path.stat().st_size for path in (model / "journal").iterdir()))
    # The commands of three rounds at most, however long it goes on.
    assert max(sizes[10:]) <= max(sizes[:5])


def test_service_that_was_taken_over_from_makes_nothing_visible(store, storage, lock, segments, tmp_path):
    store.write("named/best", saved_model(segments))
    other = saved_model(segments, name="other")
    # Another one's number, as a service has put it there that started while this one slept.
    (storage / "epoch").write_text(f"{lock.epoch + 1}\n")
    with pytest.raises(FailedPrecondition) as refused:
        store.write("named/other", other)
    assert refused.value.reason == "MODEL_FENCED"
    assert [each.name for each in store.list()] == ["best"]


def test_disk_that_is_full_is_told_and_written_to_when_there_is_room(mount, segments, tmp_path):
    disk: Path = mount("-t", "tmpfs", "-o", "size=48k,nr_inodes=64", "none")
    store = CheckpointStore(str(disk / "checkpoints"), tmp_path / "cache", owner=OWNER)
    (disk / "other").write_bytes(bytes(32 << 10))
    saved = automatic(segments, 4)
    with pytest.raises(ResourceExhausted) as refused:
        store.write("auto/digits/4", saved)
    assert refused.value.reason == "STORAGE_FULL"
    assert not [path for path in (disk / "checkpoints").rglob("*") if path.is_file()]
    (disk / "other").unlink()
    store.write("auto/digits/4", saved)
    fill(disk)
    assert content(store.read("auto/digits/4")) == content(saved)


def test_disk_that_is_read_only_is_told(mount, segments, tmp_path):
    disk: Path = mount("-t", "tmpfs", "none")
    store = CheckpointStore(str(disk / "checkpoints"), tmp_path / "cache", owner=OWNER)
    saved = saved_model(segments)
    store.write("named/best", saved)
    remount(disk, "ro")
    try:
        with pytest.raises(FailedPrecondition) as refused:
            store.write("named/other", replace(saved, name="other"))
        assert refused.value.reason == "STORAGE_READ_ONLY"
        read = store.read("named/best")
        assert content(read) == content(saved)
        read.remove_files()
        assert not list((tmp_path / "cache/fetched-checkpoints").iterdir())
        assert [each.name for each in store.list()] == ["best"]
    finally:
        remount(disk, "rw")
    store.write("named/other", replace(saved, name="other"))


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Take all room, and all names that there is room for."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with contextlib.suppress(OSError):
        for number in range(10**6):
            (disk / f"filler-{number}").touch()
