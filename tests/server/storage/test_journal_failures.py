"""A journal whose writes or fsyncs fail: it says so, takes no more, and goes on behind a checkpoint."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest
from server.storage.journal_cases import fill

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted, Unavailable
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.segment_writer import SegmentWriter


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


def test_record_that_was_written_and_does_not_count_can_be_cut_off(open_journal, entry, monkeypatch):
    journal, _ = open_journal()
    fill(journal, entry, [1])
    journal.reserve(100)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda _: os.fstat(-1))  # The lock cannot be looked at any more.
        with pytest.raises(Unavailable) as caught:
            journal.append(entry(2))
    assert caught.value.outcome == "unknown" and journal.last == 1
    journal.cut_end()
    assert open_journal()[1] == [entry(1)]


def test_end_that_another_frontend_may_have_read_is_not_cut_off(open_journal, entry, storage):
    journal, _ = open_journal()
    fill(journal, entry, [1])
    (storage / "epoch").write_text("7\n")
    with pytest.raises(FailedPrecondition) as caught:
        journal.cut_end()
    assert caught.value.reason == "MODEL_FENCED"


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
