"""A journal in ordinary life: it keeps what it was given, rolls, is cut, and lets nobody else write."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted, Unavailable
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.segment_writer import SegmentWriter
from gradwire_server.storage.storage_lock import StorageLock


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)


def fill(journal: Journal, entry, numbers) -> list:
    written = [entry(number) for number in numbers]
    for one in written:
        journal.reserve(len(one.request) + len(one.reply))
        assert journal.append(one) is None
    return written


def segments(model: Path) -> list[str]:
    return sorted(path.name for path in (model / "journal").iterdir())


def test_new_journal_is_empty(open_journal):
    journal, entries = open_journal()
    assert entries == [] and journal.last == 0 and journal.size_after(0) == 0


def test_journal_behind_a_checkpoint_begins_with_the_next_number(open_journal, entry):
    journal, entries = open_journal(after=41)
    assert entries == [] and journal.last == 41
    fill(journal, entry, [42])


def test_what_was_appended_is_there_after_another_start(open_journal, entry):
    journal, _ = open_journal()
    written = fill(journal, entry, range(1, 6))
    assert open_journal()[1] == written


def test_record_of_several_commands_counts_as_all_of_them(open_journal, entry, small_segments):
    journal, _ = open_journal()
    written = [entry(1), entry(6, commands=5), entry(7), entry(20, commands=13), entry(21)]
    for one in written:
        journal.reserve(100)
        journal.append(one)
    assert journal.last == 21
    nbytes = journal.size_after(0)
    assert nbytes > journal.size_after(1) > journal.size_after(6) > journal.size_after(20) > journal.size_after(21) == 0
    again, entries = open_journal()
    assert entries == written and again.last == 21 and again.size_after(0) == nbytes
    again.cut(7)
    assert open_journal(after=7)[1] == written[3:]
    assert open_journal(after=20)[1] == written[4:]


@pytest.mark.parametrize(("durability", "safe"), [("disk", True), ("process", False)])
async def test_what_a_killed_service_had_not_made_durable_is_so_once_the_journal_is_open(
    open_journal, entry, model, monkeypatch, durability, safe
):
    journal, _ = open_journal(durability=durability)
    may_sync = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "sync", lambda _: may_sync.wait())
        journal.reserve(100)
        journal.append(entry(1))
        synced, fsync = [], os.fsync

        def recorded(descriptor: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        patched.setattr(os, "fsync", recorded)
        name = model / "journal" / segments(model)[0]
        try:
            assert len(open_journal(durability=durability)[1]) == 1
            assert ({model, model / "journal", model / "blobs", name} <= set(synced)) == safe
        finally:
            may_sync.set()


async def test_journal_that_cannot_be_made_durable_is_not_opened(open_journal, entry, monkeypatch):
    journal, _ = open_journal(durability="disk")
    journal.reserve(100)
    await journal.append(entry(1))

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "as the test wants it")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(Unavailable) as caught:
            open_journal(durability="disk")
    assert caught.value.reason == "STORAGE_UNREACHABLE"
    assert len(open_journal(durability="disk")[1]) == 1


@pytest.mark.parametrize("after", range(7))
def test_only_entries_behind_the_checkpoint_are_given(open_journal, entry, small_segments, after):
    journal, _ = open_journal()
    written = fill(journal, entry, range(1, 7))
    reopened, entries = open_journal(after)
    assert entries == written[after:] == list(journal.entries(after))
    assert reopened.last == 6


def test_open_journal_gives_the_entries_that_are_there_at_that_moment(open_journal, entry):
    journal, _ = open_journal()
    written = fill(journal, entry, range(1, 4))
    entries = journal.entries(1)
    fill(journal, entry, [4])
    assert list(entries) == written[1:]


def test_segments_roll_and_starts_begin_new_ones(open_journal, entry, small_segments, model):
    journal, _ = open_journal()
    written = fill(journal, entry, range(1, 7))
    assert segments(model) == [f"00000001-{first:012d}.log" for first in (1, 3, 5)]
    again, entries = open_journal()
    assert entries == written
    written += fill(again, entry, [7])
    assert open_journal()[1] == written


def test_starts_that_record_nothing_leave_one_segment(storage, model, entry):
    for epoch in range(1, 5):
        lock = StorageLock.take(storage, 0.0)
        journal, _ = Journal.open(model, lock, durability="process", after=0)
        if epoch == 1:
            fill(journal, entry, [1])
        journal.close()
        lock.release()
    assert segments(model) == ["00000001-000000000001.log", "00000004-000000000002.log"]


def test_reserved_room_goes_back_when_a_segment_is_done(open_journal, entry, model):
    journal, _ = open_journal()
    fill(journal, entry, [1])
    (path,) = (model / "journal").iterdir()
    assert path.stat().st_size < 4096 and path.stat().st_blocks * 512 >= 1 << 20
    journal.close()
    assert path.stat().st_blocks * 512 <= 8192


def test_room_that_a_killed_service_had_reserved_goes_back_at_the_next_start(open_journal, entry, model):
    fill(open_journal()[0], entry, [1])
    open_journal()
    (path,) = (model / "journal").glob("*1.log")
    assert path.stat().st_blocks * 512 <= 8192


def test_number_out_of_turn_is_a_defect(open_journal, entry):
    journal, _ = open_journal()
    with pytest.raises(AssertionError):
        journal.append(entry(2))


def test_only_durabilities_that_a_journal_has_are_taken(lock, model):
    with pytest.raises(ValueError, match="not at 'none'"):
        Journal.open(model, lock, durability="none", after=0)


def test_cut_removes_segments_that_hold_nothing_behind_it(open_journal, entry, small_segments, model):
    journal, _ = open_journal()
    written = fill(journal, entry, range(1, 7))
    journal.cut(3)
    assert segments(model) == [f"00000001-{first:012d}.log" for first in (3, 5)]
    assert list(journal.entries(3)) == written[3:] == open_journal(3)[1]
    with pytest.raises(FailedPrecondition, match="commands 2 to 2 are missing"):
        list(journal.entries(1))


def test_cut_at_the_end_leaves_nothing_after_the_next_cut(open_journal, entry, model):
    journal, _ = open_journal()
    fill(journal, entry, range(1, 4))
    journal.cut(3)
    fill(journal, entry, [4])
    journal.cut(4)
    assert segments(model) == ["00000001-000000000004.log"]
    assert open_journal(4)[1] == []


def test_size_counts_the_records_behind_a_number_since_the_cut(open_journal, entry):
    journal, _ = open_journal()
    fill(journal, entry, range(1, 4))
    one = journal.size_after(2)
    assert one > 40 and journal.size_after(0) == 3 * one and journal.size_after(3) == journal.size_after(9) == 0
    journal.cut(2)
    assert journal.size_after(0) == one
    fill(journal, entry, [4])
    assert journal.size_after(0) == 2 * one and journal.size_after(3) == one
    assert open_journal(2)[0].size_after(0) == 2 * one


def test_missing_segment_is_reported(open_journal, entry, small_segments, model):
    journal, _ = open_journal()
    fill(journal, entry, range(1, 7))
    (model / "journal" / "00000001-000000000003.log").unlink()
    with pytest.raises(FailedPrecondition, match="commands 3 to 4 are missing") as caught:
        open_journal()
    assert caught.value.reason == "JOURNAL_CORRUPT" and "00000001-000000000001.log" in str(caught.value)
    with pytest.raises(FailedPrecondition, match="commands 3 to 4 are missing"):
        open_journal(after=2)
    assert len(open_journal(after=4)[1]) == 2


@pytest.mark.parametrize("name", ["00000001-000000000009.log", "00000002-000000000001.log"])
def test_segment_under_another_name_is_reported(open_journal, entry, model, name):
    fill(open_journal()[0], entry, range(1, 3))
    (path,) = (model / "journal").iterdir()
    path.rename(path.with_name(name))
    with pytest.raises(FailedPrecondition) as caught:
        open_journal()
    assert caught.value.reason == "JOURNAL_CORRUPT" and name in str(caught.value)


def test_segment_of_a_later_version_is_refused_by_name(open_journal, entry, model, monkeypatch):
    monkeypatch.setattr("gradwire_server.storage.segments._VERSION", 2)
    fill(open_journal()[0], entry, [1])
    monkeypatch.undo()
    with pytest.raises(FailedPrecondition, match="has version 2; this service reads 1") as caught:
        open_journal()
    assert caught.value.reason == "STORAGE_VERSION"


def test_record_of_a_fenced_writer_is_not_acknowledged_and_not_read(open_journal, entry, storage, model):
    old, _ = open_journal()
    written = fill(old, entry, [1, 2])
    (storage / "lock").unlink()  # As an operator does who takes it for stale.
    lock = StorageLock.take(storage, 0.0)
    new, entries = open_journal(lock=lock)
    assert entries == written
    with pytest.raises(FailedPrecondition) as caught:
        old.append(entry(3))
    assert caught.value.reason == "MODEL_FENCED" and caught.value.outcome == "unknown"
    with pytest.raises(FailedPrecondition) as caught:
        old.reserve(10)
    assert caught.value.reason == "MODEL_FENCED" and caught.value.outcome == "not_applied"
    with pytest.raises(FailedPrecondition):
        old.restart(3)
    written += fill(new, entry, [3, 4])
    assert open_journal(lock=lock)[1] == written
    lock.release()


def test_record_of_a_fenced_writer_counts_not_even_before_the_new_one_writes(open_journal, entry, storage):
    old, _ = open_journal()
    written = fill(old, entry, [1, 2])
    (storage / "lock").unlink()
    lock = StorageLock.take(storage, 0.0)
    open_journal(lock=lock)
    with pytest.raises(FailedPrecondition):
        old.append(entry(3, 500))
    assert open_journal(lock=lock)[1] == written
    lock.release()


def test_record_between_takeover_and_reading_is_read_by_the_new_one(open_journal, entry, storage):
    old, _ = open_journal()
    fill(old, entry, [1])
    (storage / "lock").unlink()
    lock = StorageLock.take(storage, 0.0)
    with pytest.raises(FailedPrecondition):
        old.append(entry(2))
    assert open_journal(lock=lock)[1] == [entry(1), entry(2)]
    lock.release()


def test_fenced_writer_begins_no_segment(open_journal, entry, storage, model):
    old, _ = open_journal()
    fill(old, entry, [1])
    old.cut(1)
    (storage / "lock").unlink()
    lock = StorageLock.take(storage, 0.0)
    before = segments(model)
    with pytest.raises(FailedPrecondition) as caught:
        old.reserve(10)
    assert caught.value.reason == "MODEL_FENCED" and caught.value.outcome == "not_applied"
    assert segments(model) == before
    lock.release()


def test_journal_of_a_later_epoch_is_refused(open_journal, entry, storage, lock):
    fill(open_journal()[0], entry, [1])
    lock.epoch = 0
    with pytest.raises(FailedPrecondition, match="a later epoch wrote it"):
        open_journal()


def failing(method: str, code: int, monkeypatch):
    """Makes SegmentWriter fail so; a list that grows by one with each try."""
    tries = []

    def fail(self, *arguments):
        tries.append(arguments)
        raise OSError(code, "as the test wants it")

    monkeypatch.setattr(SegmentWriter, method, fail)
    return tries


def test_what_was_written_ahead_is_appended_once(open_journal, entry):
    journal, _ = open_journal()
    for number in (1, 2):
        journal.reserve(100)
        journal.write_ahead(one := entry(number))
        journal.append(one)
    journal.reserve(100)
    assert journal.append(entry(3)) is None
    assert open_journal()[1] == [entry(1), entry(2), entry(3)]


def test_failure_of_what_is_written_ahead_is_told_by_append(open_journal, entry, monkeypatch):
    journal, _ = open_journal()
    journal.reserve(100)
    with monkeypatch.context() as patched:
        failing("write", errno.EIO, patched)
        journal.write_ahead(one := entry(1))
    with pytest.raises(Unavailable) as caught:
        journal.append(one)
    assert caught.value.outcome == "unknown" and journal.broken is not None and journal.last == 0


def test_failed_write_breaks_the_journal_until_it_goes_on_behind_a_checkpoint(open_journal, entry, monkeypatch):
    journal, _ = open_journal()
    fill(journal, entry, [1, 2])
    with monkeypatch.context() as patched:
        failing("write", errno.ENOSPC, patched)
        with pytest.raises(ResourceExhausted) as caught:
            journal.append(entry(3))
    assert caught.value.reason == "STORAGE_FULL" and caught.value.outcome == "unknown"
    with pytest.raises(ResourceExhausted) as caught:
        journal.reserve(10)
    assert caught.value.outcome == "not_applied"
    with pytest.raises(ResourceExhausted):
        journal.append(entry(3))
    journal.restart(3)
    assert journal.broken is None and journal.last == 3
    fill(journal, entry, [4])
    assert open_journal(3)[1] == [entry(4)]


def test_half_a_record_of_a_failed_write_is_never_read(open_journal, entry, monkeypatch, model):
    journal, _ = open_journal()
    fill(journal, entry, [1, 2])
    write = SegmentWriter.write

    def half(self, parts):
        write(self, parts[:2])
        raise OSError(errno.EIO, "as the test wants it")

    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "write", half)
        with pytest.raises(Unavailable) as caught:
            journal.append(entry(3))
    assert caught.value.reason == "STORAGE_UNREACHABLE"
    assert open_journal()[1] == [entry(1), entry(2)]


def test_restart_that_fails_leaves_the_journal_broken(open_journal, entry, monkeypatch):
    journal, _ = open_journal()
    fill(journal, entry, [1])
    with monkeypatch.context() as patched:
        failing("write", errno.ENOSPC, patched)
        with pytest.raises(ResourceExhausted):
            journal.append(entry(2))
        with pytest.raises(ResourceExhausted):
            journal.restart(2)
    with pytest.raises(ResourceExhausted):
        journal.reserve(10)
    journal.restart(2)
    fill(journal, entry, [3])
    assert open_journal(2)[1] == [entry(3)]


def test_restart_at_the_first_command_of_a_segment_replaces_it(open_journal, entry, monkeypatch):
    journal, _ = open_journal()
    with monkeypatch.context() as patched:
        failing("write", errno.EIO, patched)
        with pytest.raises(Unavailable):
            journal.append(entry(1))
    journal.restart(0)
    fill(journal, entry, [1])
    assert open_journal()[1] == [entry(1)]


async def test_at_disk_a_command_is_durable_when_its_future_is_done(open_journal, entry, monkeypatch):
    synced = []
    sync = SegmentWriter.sync
    monkeypatch.setattr(SegmentWriter, "sync", lambda self: (sync(self), synced.append(self.end)))
    journal, _ = open_journal(durability="disk")
    for number in range(1, 4):
        journal.reserve(100)
        future = journal.append(entry(number))
        assert future is not None and not future.done()
        await future
        assert synced[-1] >= journal.size_after(0)
    assert open_journal()[1] == [entry(1), entry(2), entry(3)]


async def test_files_and_their_folder_are_fsynced_at_disk_alone(open_journal, entry, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "fdatasync", lambda file: asked.append("file"))
    monkeypatch.setattr("gradwire_server.storage.segment_writer.sync_folder", lambda folder: asked.append(folder.name))
    journal, _ = open_journal(durability="disk")
    await journal.append(entry(1))
    await journal.append(entry(2))
    assert asked == ["file", "journal", "file"]
    journal, _ = open_journal()
    assert journal.append(entry(3)) is None
    assert len(asked) == 3


async def test_at_disk_a_rolled_segment_is_synced_before_what_follows_it(open_journal, entry, monkeypatch):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1)
    synced = []
    sync = SegmentWriter.sync
    monkeypatch.setattr(SegmentWriter, "sync", lambda self: (sync(self), synced.append(self.first)))
    journal, _ = open_journal(durability="disk")
    futures = []
    for number in range(1, 9):
        journal.reserve(100)
        futures.append(journal.append(entry(number)))
    await asyncio.gather(*futures)
    assert synced == list(range(1, 9))
    journal.close()
    assert open_journal()[1] == [entry(number) for number in range(1, 9)]


async def test_failed_fsync_breaks_the_journal_and_is_never_tried_again(open_journal, entry, monkeypatch):
    journal, _ = open_journal(durability="disk")
    with monkeypatch.context() as patched:
        tries = failing("sync", errno.EIO, patched)
        fail, may_fail = SegmentWriter.sync, threading.Event()
        patched.setattr(SegmentWriter, "sync", lambda self: (may_fail.wait(), fail(self)))
        futures = []
        for number in range(1, 4):
            journal.reserve(100)
            futures.append(journal.append(entry(number)))
        may_fail.set()
        for error in await asyncio.gather(*futures, return_exceptions=True):
            assert isinstance(error, Unavailable)
            assert error.reason == "STORAGE_UNREACHABLE" and error.outcome == "unknown"
        assert len(tries) == 1
    with pytest.raises(Unavailable) as caught:
        journal.reserve(10)
    assert caught.value.outcome == "not_applied"
    with pytest.raises(Unavailable):
        journal.append(entry(4))
    journal.restart(3)
    journal.reserve(100)
    await journal.append(entry(4))
    assert open_journal(3)[1] == [entry(4)]


async def test_fsync_that_waits_behind_a_failed_one_is_not_tried_either(open_journal, entry, monkeypatch):
    journal, _ = open_journal(durability="disk")
    begun, go, tries = threading.Event(), threading.Event(), []

    def fail(self):
        tries.append(self.first)
        begun.set()
        assert go.wait(10.0)
        raise OSError(errno.EIO, "as the test wants it")

    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "sync", fail)
        first = journal.append(entry(1))
        assert await asyncio.to_thread(begun.wait, 10.0)
        second = journal.append(entry(2))
        go.set()
        assert all(
            isinstance(error, Unavailable) for error in await asyncio.gather(first, second, return_exceptions=True)
        )
        assert tries == [1]


async def test_restart_waits_for_what_the_old_segment_still_owes(open_journal, entry, monkeypatch):
    journal, _ = open_journal(durability="disk")
    begun, go, tries = threading.Event(), threading.Event(), []
    sync = SegmentWriter.sync

    def fail_once(self):
        tries.append(self.first)
        if self.first != 1:
            return sync(self)
        begun.set()
        assert go.wait(10.0)
        raise OSError(errno.EIO, "as the test wants it")

    monkeypatch.setattr(SegmentWriter, "sync", fail_once)
    futures = [journal.append(entry(1))]
    assert await asyncio.to_thread(begun.wait, 10.0)
    futures.append(journal.append(entry(2)))
    threading.Timer(0.2, go.set).start()
    journal.restart(2)
    assert go.is_set() and journal.broken is None
    await journal.append(entry(3))
    assert all(isinstance(error, Unavailable) for error in await asyncio.gather(*futures, return_exceptions=True))
    assert tries == [1, 3]


@pytest.mark.parametrize("limit", [1, 7, 41, 100])
def test_short_writes_are_gone_on_with(open_journal, entry, monkeypatch, limit):
    pwritev, pwrite = os.pwritev, os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda file, parts, at: pwrite(file, b"".join(parts)[:limit], at))
    monkeypatch.setattr(os, "pwrite", lambda file, part, at: pwritev(file, [part[:limit]], at))
    journal, _ = open_journal()
    written = fill(journal, entry, range(1, 4))
    monkeypatch.undo()
    assert open_journal()[1] == written
