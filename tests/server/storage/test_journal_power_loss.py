"""What a loss of power leaves of a journal at durability "disk": pages of one fsync reach the disk in any order."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.records import StoredUpload
from gradwire_server.storage.segment_reading import read_segments
from gradwire_server.storage.segments import list_segments

SECTOR = 512


async def write(open_journal: Any, entry: Any, groups: list[list[int]], nbytes: int = 2000, model: Any = None) -> list:
    """Records of these commands; each group shares one fsync. Where they lie."""
    journal, _ = open_journal(durability="disk")
    for group in groups:
        waiting = []
        for number in group:
            journal.reserve(nbytes)
            waiting.append(journal.append(entry(number, nbytes)))
        for each in waiting:
            await each
    journal.close()
    return list(read_segments(list_segments(model / "journal"), 0))


def found(open_journal: Any) -> list[int]:
    return [each.number for each in open_journal(durability="disk")[1]]


def sectors(placed: Any) -> list[int]:
    """Where those begin that only this record, or what is behind it, reaches into; and the record itself."""
    return [placed.start, *range(-(-placed.start // SECTOR) * SECTOR, placed.end, SECTOR)]


def make_hole(path: Path, start: int) -> None:
    content = bytearray(path.read_bytes())
    end = min(start // SECTOR * SECTOR + SECTOR, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


@pytest.mark.parametrize(("groups", "holed", "kept"), [([[1], [2]], 1, [1]), ([[1], [2, 3, 4]], 1, [1])])
async def test_hole_in_what_no_fsync_had_made_durable_is_a_torn_end(open_journal, entry, model, groups, holed, kept):
    placed = (await write(open_journal, entry, groups, model=model))[holed]
    content = placed.path.read_bytes()
    for start in sectors(placed):
        placed.path.write_bytes(content)
        make_hole(placed.path, start)
        for later in list_segments(model / "journal")[1:]:
            later.path.unlink()
        assert found(open_journal) == kept, start
    assert found(open_journal) == kept, "and once more, behind what the last start did"


async def test_hole_in_what_was_acknowledged_is_reported(open_journal, entry, model):
    # The last but one's end lies in a sector with the header that says that it was durable.
    *acknowledged, _, _ = await write(open_journal, entry, [[1], [2], [3], [4]], model=model)
    for placed in acknowledged:
        content = placed.path.read_bytes()
        for start in sectors(placed):
            make_hole(placed.path, start)
            with pytest.raises(FailedPrecondition) as refused:
                found(open_journal)
            assert refused.value.reason == "JOURNAL_CORRUPT" and f"byte {placed.start}" in str(refused.value)
            placed.path.write_bytes(content)


async def test_flip_of_any_byte_that_was_acknowledged_is_reported(open_journal, entry, model):
    placed = await write(open_journal, entry, [[1], [2], [3]], 40, model=model)
    path = placed[0].path
    content = path.read_bytes()
    for offset in range(placed[-1].end):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        with pytest.raises(FailedPrecondition, match=path.name):
            list(read_segments(list_segments(model / "journal"), 0))


async def test_torn_end_before_a_segment_that_shared_its_fsync_ends_the_journal(
    open_journal, entry, model, monkeypatch
):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1)
    _, placed, _ = await write(open_journal, entry, [[1], [2, 3]], model=model)
    os.truncate(placed.path, placed.end - 10)
    journal, entries = open_journal(durability="disk")
    assert [each.number for each in entries] == [1]
    journal.reserve(40)
    await journal.append(entry(2))
    assert found(open_journal) == [1, 2]


async def test_torn_end_before_a_segment_that_came_when_it_was_durable_is_reported(
    open_journal, entry, model, monkeypatch
):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1)
    _, placed, _ = await write(open_journal, entry, [[1], [2], [3]], model=model)
    os.truncate(placed.path, placed.end - 10)
    with pytest.raises(FailedPrecondition, match="commands 2 to 2 are missing"):
        found(open_journal)


@pytest.mark.parametrize("of", ["journal", "blobs"])
async def test_sector_that_the_disk_cannot_read_is_reported_and_ends_no_process(
    open_journal, entry, model, tmp_path, monkeypatch, of
):
    (tmp_path / "source").write_bytes(bytes(100))
    journal, _ = open_journal()
    file = journal.keep_upload(tmp_path / "source", "uploads/a")
    upload = StoredUpload(name="uploads/a", file=file, tensors=(), fingerprint=bytes(16))
    journal.reserve(40, [upload])
    journal.append(entry(1, uploads=(upload,)))
    journal.close()

    def unreadable(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if of == "journal":
        monkeypatch.setattr(os, "preadv", unreadable)
    else:
        monkeypatch.setattr("gradwire_server.storage.journal_recovery.file_fingerprint", unreadable)
    with pytest.raises(FailedPrecondition) as refused:
        open_journal()
    assert refused.value.reason == "JOURNAL_CORRUPT" and f"{of}/" in str(refused.value)
