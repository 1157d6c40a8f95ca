"""A short log is cut and flipped at every byte: what is left is a prefix, or what is wrong is said."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.segment_reading import Placed, read_segments
from gradwire_server.storage.segments import list_segments
from gradwire_server.storage.storage_lock import StorageLock

SECTOR = 512


@dataclass
class Log:
    """A journal's files, written and left as a killed service leaves them; `torn`: bytes of a record not finished."""

    lock: StorageLock
    folder: Path
    placed: list[Placed]
    torn: int

    @property
    def paths(self) -> list[Path]:
        return [segment.path for segment in list_segments(self.folder / "journal")]

    @property
    def entries(self) -> list[Entry]:
        return [copied(placed.entry) for placed in self.placed]

    def reopened(self, folder: Path) -> list[Entry]:
        journal, entries = Journal.open(folder, self.lock, durability="process", after=0)
        found = [copied(entry) for entry in entries]
        assert journal.last == len(found)
        journal.close()
        return found


def copied(entry: Entry) -> Entry:
    """The entry without a part of a mapped file, which a test changes."""
    fields = {name: getattr(entry, name) for name in Entry.__slots__}
    return Entry(**{**fields, "request": bytes(entry.request)})


@contextmanager
def written_log(sizes: list[int], torn: bool, segment_bytes: int) -> Iterator[Log]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal_module, "SEGMENT_BYTES", segment_bytes)
        folder = Path(name) / "models" / "m"
        lock = StorageLock.take(Path(name), 0.0)
        journal, _ = Journal.open(folder, lock, durability="process", after=0)
        for number, size in enumerate(sizes, 1):
            # Zeros too: as numbers that are trained on, they are no sign of a torn record.
            request = bytes(size // 2) + bytes(range(1, size - size // 2 + 1))
            journal.reserve(size)
            journal.append(
                Entry(number=number, method="A", request=request, reply=b"\0", request_id=None, body=b"digest")
            )
        journal.close()
        log = Log(lock, folder, [], 0)
        if torn:
            (*_, final) = read_segments(list_segments(folder / "journal"), 0)
            log.torn = (final.end - final.start) // 2
            os.truncate(final.path, final.start + log.torn)
        log.placed = [
            Placed(copied(placed.entry), placed.path, placed.start, placed.end)
            for placed in read_segments(list_segments(folder / "journal"), 0)
        ]
        assert len(log.placed) == len(sizes) - torn
        yield log
        lock.release()


logs = given(
    sizes=st.lists(st.integers(0, 60), min_size=2, max_size=4),
    torn=st.booleans(),
    segment_bytes=st.sampled_from([1, 200, 10_000]),
)
few = settings(max_examples=2, deadline=None)
three_segments = example(sizes=[60, 0, 7, 20, 33], torn=False, segment_bytes=250)
torn_end = example(sizes=[20, 9, 50], torn=True, segment_bytes=150)


@few
@three_segments
@torn_end
@logs
def test_cut_at_any_byte_leaves_the_records_before_it(sizes, torn, segment_bytes):
    with written_log(sizes, torn, segment_bytes) as log:
        paths = log.paths
        for index, path in enumerate(paths):
            for length in range(path.stat().st_size + 1):
                folder = log.folder.parent / "cut"
                shutil.copytree(log.folder, folder)
                for later in paths[index + 1 :]:
                    (folder / "journal" / later.name).unlink()
                with (folder / "journal" / path.name).open("r+b") as file:
                    file.truncate(length)
                kept = [p.entry for p in log.placed if p.path in paths[:index] or (p.path == path and p.end <= length)]
                assert log.reopened(folder) == kept, (path.name, length)
                if length % 8 == 0:
                    assert log.reopened(folder) == kept, "and once more, behind what the first start did"
                shutil.rmtree(folder)


def read_or_report(log: Log) -> list[Entry] | FailedPrecondition:
    try:
        return [copied(placed.entry) for placed in read_segments(list_segments(log.folder / "journal"), 0)]
    except FailedPrecondition as error:
        return error


@few
@three_segments
@torn_end
@logs
def test_flip_of_any_bit_is_reported_with_its_file(sizes, torn, segment_bytes):
    with written_log(sizes, torn, segment_bytes) as log:
        paths, flips = log.paths, 0
        for path in paths:
            size = path.stat().st_size
            # What a record that was cut off holds matters to nobody.
            checked = size - log.torn if path == paths[-1] else size
            with path.open("r+b", buffering=0) as file:
                for offset in range(size):
                    (byte,) = path.read_bytes()[offset : offset + 1]
                    for bit in range(8):
                        file.seek(offset)
                        file.write(bytes([byte ^ 1 << bit]))
                        flips += 1
                        found = read_or_report(log)
                        if isinstance(found, FailedPrecondition):
                            assert found.reason == "JOURNAL_CORRUPT" and str(path) in str(found)
                        else:
                            assert offset >= checked and found == log.entries, (path.name, offset, bit)
                    file.seek(offset)
                    file.write(bytes([byte]))
        assert flips == 8 * sum(path.stat().st_size for path in paths)
        assert log.reopened(log.folder) == log.entries


@pytest.mark.parametrize("value", [0x00, 0xFF])
def test_byte_of_any_record_that_is_overwritten_is_reported_when_the_journal_is_opened(value):
    with written_log([20, 9, 50], False, 200) as log:
        for path in log.paths:
            content = path.read_bytes()
            for offset in range(len(content)):
                changed = content[:offset] + bytes([value]) + content[offset + 1 :]
                path.write_bytes(changed)
                if changed != content:
                    with pytest.raises(FailedPrecondition) as caught:
                        log.reopened(log.folder)
                    assert caught.value.reason == "JOURNAL_CORRUPT" and str(path) in str(caught.value)
            path.write_bytes(content)
        assert log.reopened(log.folder) == log.entries


def zeroed(log: Log, start: int, to: int | None = None) -> None:
    """Overwrite the last segment with zeros from `start`, and make it `to` bytes long."""
    path = log.paths[-1]
    size = path.stat().st_size if to is None else to
    content = path.read_bytes()[:start]
    path.write_bytes(content + bytes(size - len(content)))


@pytest.mark.parametrize("sector", range(4))
def test_zeros_from_any_sector_on_are_a_torn_end_as_a_power_loss_leaves_it(sector):
    with written_log([60] * 12, False, 10_000) as log:
        start = sector * SECTOR
        zeroed(log, start)
        assert log.reopened(log.folder) == [p.entry for p in log.placed if p.end <= start]


def test_zeros_behind_the_last_record_are_room_that_was_never_written_to():
    with written_log([20, 9, 50], False, 10_000) as log:
        end = log.placed[-1].end
        zeroed(log, end, end + 5000)
        assert log.reopened(log.folder) == log.entries


def test_zeros_with_records_behind_them_are_no_torn_end():
    with written_log([60] * 12, False, 10_000) as log:
        path = log.paths[-1]
        content = bytearray(path.read_bytes())
        content[SECTOR : 2 * SECTOR] = bytes(SECTOR)
        path.write_bytes(content)
        with pytest.raises(FailedPrecondition) as caught:
            log.reopened(log.folder)
        assert caught.value.reason == "JOURNAL_CORRUPT" and str(path) in str(caught.value)


def test_torn_end_in_an_earlier_segment_is_reported():
    with written_log([20, 9, 50], False, 1) as log:
        first = log.paths[0]
        first.write_bytes(first.read_bytes()[:-3])
        with pytest.raises(FailedPrecondition, match="commands 1 to 1 are missing") as caught:
            log.reopened(log.folder)
        assert str(first) in str(caught.value)


def test_torn_end_is_cut_off_so_that_it_takes_no_room():
    with written_log([20, 50], True, 10_000) as log:
        path = log.paths[-1]
        log.reopened(log.folder)
        assert path.stat().st_size == log.placed[-1].end


def test_records_of_mapped_files_hold_no_bytes_of_their_own():
    with written_log([20, 9, 50], False, 10_000) as log:
        journal, entries = Journal.open(log.folder, log.lock, durability="process", after=0)
        requests = [entry.request for entry in entries]
        assert all(isinstance(request, memoryview) for request in requests)
        assert len({id(request.obj) for request in requests if isinstance(request, memoryview)}) == 1
        journal.close()
