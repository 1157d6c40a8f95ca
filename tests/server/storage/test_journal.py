"""A journal in ordinary life: it keeps what it was given, rolls, is cut, and lets nobody else write."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from server.storage.journal_cases import fill, segments

from gradwire_proto.errors import FailedPrecondition, Unavailable
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.segment_writer import SegmentWriter
from gradwire_server.storage.storage_lock import StorageLock


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)


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
    journal.cut(3)()
    assert segments(model) == [f"00000001-{first:012d}.log" for first in (3, 5)]
    assert list(journal.entries(3)) == written[3:] == open_journal(3)[1]
    with pytest.raises(FailedPrecondition, match="commands 2 to 2 are missing"):
        list(journal.entries(1))


def test_cut_at_the_end_leaves_nothing_after_the_next_cut(open_journal, entry, model):
    journal, _ = open_journal()
    fill(journal, entry, range(1, 4))
    journal.cut(3)()
    fill(journal, entry, [4])
    journal.cut(4)()
    assert segments(model) == ["00000001-000000000004.log"]
    assert open_journal(4)[1] == []


def test_size_counts_the_records_behind_a_number_since_the_cut(open_journal, entry):
    journal, _ = open_journal()
    fill(journal, entry, range(1, 4))
    one = journal.size_after(2)
    assert one > 40 and journal.size_after(0) == 3 * one and journal.size_after(3) == journal.size_after(9) == 0
    journal.cut(2)()
    assert journal.size_after(0) == one
    fill(journal, entry, [4])
    assert journal.size_after(0) == 2 * one and journal.size_after(3) == one
    assert open_journal(2)[0].size_after(0) == 2 * one


def refuse(journal: Journal, entry, number: int, name: str):
    """Record that a command was refused behind command `number`."""
    one = entry(number, 0, reply=None, request_id=name, refused="it kills ranks", unnumbered=True)
    journal.append(one)
    return one


def test_refused_commands_take_no_number_and_are_there_after_another_start(open_journal, entry, small_segments):
    journal, _ = open_journal()
    written = [refuse(journal, entry, 0, "first")]
    for number in range(1, 7):
        written += fill(journal, entry, [number])
        written += [refuse(journal, entry, number, name) for name in "ab"]
    assert journal.last == 6 and list(journal.entries(0)) == written
    for after in range(7):
        reopened, entries = open_journal(after)
        assert reopened.last == 6
        assert [each.number for each in entries if not each.unnumbered] == list(range(after + 1, 7))
        refused = {(each.number, each.request_id) for each in entries if each.unnumbered}
        assert refused >= {(number, name) for number in range(max(after, 1), 7) for name in "ab"}


def test_commands_refused_at_starts_that_record_nothing_else_are_kept(storage, model, entry):
    written = []
    for epoch in range(1, 5):
        lock = StorageLock.take(storage, 0.0)
        journal, entries = Journal.open(model, lock, durability="process", after=0)
        assert sorted(each.request_id for each in entries) == sorted(each.request_id for each in written)
        if epoch == 1:
            written += fill(journal, entry, [1])
        elif epoch < 4:
            written.append(refuse(journal, entry, 1, f"refused {epoch}"))
        journal.close()
        lock.release()
    assert len(written) == 3


def test_cut_leaves_what_was_refused_behind_the_checkpoint(open_journal, entry):
    journal, _ = open_journal()
    fill(journal, entry, [1, 2])
    # While the checkpoint of 2 was being written.
    refused = refuse(journal, entry, 2, "late")
    journal.cut(2)()
    fill(journal, entry, [3])
    journal.cut(2)()
    assert refused in list(journal.entries(2)) and refused in open_journal(2)[1]
    journal.cut(3)()
    assert refused not in open_journal(3)[1]


def test_journal_that_goes_on_after_a_failure_goes_on_behind_refused_commands(open_journal, entry, monkeypatch):
    journal, _ = open_journal()
    fill(journal, entry, [1])
    refuse(journal, entry, 1, "a")
    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        with pytest.raises(Unavailable):
            journal.append(entry(2))
    journal.restart(2)
    written = [refuse(journal, entry, 2, "b"), *fill(journal, entry, [3])]
    assert list(journal.entries(2)) == written == open_journal(2)[1]


def test_cut_while_the_journal_is_started_anew_does_nothing(open_journal, entry, small_segments, model, monkeypatch):
    journal, _ = open_journal()
    fill(journal, entry, range(1, 7))
    before = segments(model)

    def finish(_: Journal) -> None:
        journal.cut(6)()
        assert segments(model) == before

    monkeypatch.setattr(journal._lock.commits, "finish", finish)
    journal.restart(6)
    monkeypatch.undo()
    assert segments(model) == ["00000001-000000000007.log"]
    fill(journal, entry, [7])
    journal.cut(6)()


def test_what_a_frontend_that_was_taken_over_from_recorded_ends_nothing(open_journal, entry, storage, model):
    old, _ = open_journal()
    written = fill(old, entry, [1])
    lock = StorageLock(storage, old._lock._lock, old._lock.epoch + 1, "")
    new, _ = open_journal(lock=lock)
    # It does not know yet.
    written.append(refuse(old, entry, 1, "stale"))
    fill(old, entry, [2])
    written += fill(new, entry, [2, 3])
    assert open_journal(lock=lock)[1] == written


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
    old.cut(1)()
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
