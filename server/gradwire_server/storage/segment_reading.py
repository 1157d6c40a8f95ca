"""The records of a journal as they are read back, and where they end.

A power loss or a kill leaves the end of the last segment torn: the file ends inside a record, or from some sector on
there is nothing but zeros. That is no error. A power loss may also leave a hole: sectors of zeros, with whole ones
behind them, for the disk took the pages of one fsync in any order. That is no error in what no fsync had made durable,
as the records around it tell at durability "disk"; nobody was told of these commands. At "process" they tell nothing:
what was answered may lie there. Whatever else does not check is JOURNAL_CORRUPT.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.mapped_files import mapped
from gradwire_server.storage.records import BEGIN, HEADER_BYTES, BadRecord, Entry, Header, decode, decode_header
from gradwire_server.storage.segments import START_BYTES, SegmentFile, check_start, needed, seed_of
from gradwire_server.storage.storage_errors import journal_corrupt

logger = logging.getLogger(__name__)

_SECTOR = 512
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry, and where its record lies: the file, and where in it, in bytes."""

    entry: Entry
    path: Path
    start: int
    end: int


def read_segments(segments: Sequence[SegmentFile], after: int) -> Iterator[Placed]:
    """The entries of the segments that may hold one behind command `after`, in order. They are mapped, not loaded.

    Raises FailedPrecondition JOURNAL_CORRUPT, also where entries are missing between two; STORAGE_VERSION.
    """
    for segment in segments:
        if _may_end_with_refused(segment, after):
            yield from _refused_last(segment)
    wanted = [segment for segment in segments if needed(segment, after)]
    if wanted and wanted[0].first > after + 1:
        raise journal_corrupt(wanted[0].path, 0, f"the commands {after + 1} to {wanted[0].first - 1} are missing")
    for index, segment in enumerate(wanted):
        number, end, later = segment.first, START_BYTES, wanted[index + 1 :]
        for placed in read_segment(segment, later):
            number, end = placed.entry.number + 1, placed.end
            yield placed
        if segment.until is not None and number < segment.until:
            if _was_unsynced(number, [segment, *later]):
                return
            what = f"the commands {number} to {segment.until - 1} are missing: the file ends too early"
            raise journal_corrupt(segment.path, end, what)


def _may_end_with_refused(segment: SegmentFile, after: int) -> bool:
    """Whether nothing else of the segment is behind `after`."""
    until = segment.until
    return until is not None and until > after and segment.first <= until and until in (after + 1, segment.first)


def _refused_last(segment: SegmentFile) -> Iterator[Placed]:
    """What was refused behind the last command of a segment: a checkpoint of that command may not know it.

    No command is needed: where they are damaged, or gone, nothing is lost that a model is made from.
    """
    try:
        for placed in read_segment(segment):
            if placed.entry.unnumbered and placed.entry.number + 1 == segment.until:
                yield placed
    except FailedPrecondition as error:
        logger.warning("%s", error)


def read_segment(segment: SegmentFile, later: Sequence[SegmentFile] = ()) -> Iterator[Placed]:
    """The entries of one segment, which should be whole up to `until`; a torn end ends it. later: those behind it."""
    data = mapped(segment.path)
    written = _written(data)
    there = min(len(data), _next_sector(written))  # What follows are zeros that a whole record cannot reach into.
    if there < START_BYTES:
        return
    check_start(segment, data)
    seed, offset, number = seed_of(data[:START_BYTES]), START_BYTES, segment.first
    while offset < written:
        ends, header = number == segment.until, None
        try:
            header = _whole_record(data[offset:], there - offset, seed)
            if header is None or (ends and not header.unnumbered):
                return
            entry = decode(header, data[offset : offset + header.nbytes], seed)
            found, expected = (header.number, number - 1) if header.unnumbered else (entry.first, number)
            if found != expected:
                raise BadRecord(f"command {found} where {expected} should be")
        except BadRecord as error:
            if ends:
                return  # It belongs to what was never acknowledged.
            end = offset + (header.nbytes if header is not None else HEADER_BYTES)
            if _has_hole(data, offset, end) and _was_unsynced(number, [segment, *later]):
                logger.warning("%s, byte %d: what a power loss left unfinished ends here", segment.path, offset)
                return
            raise journal_corrupt(segment.path, offset, str(error)) from error
        yield Placed(entry, segment.path, offset, offset + header.nbytes)
        offset, number = offset + header.nbytes, header.number + 1


def _whole_record(data: memoryview, there: int, seed: int) -> Header | None:
    """The header of the record at the start of `data`; None where the record is torn: only `there` bytes are left."""
    if len(data) < HEADER_BYTES:
        return None
    try:
        header = decode_header(data, seed)
    except BadRecord:
        if there < HEADER_BYTES:
            return None
        raise
    return header if header.nbytes <= there else None


def _written(data: memoryview) -> int:
    """Bytes up to the last one that is not zero."""
    end = len(data)
    while end:
        start = max(0, end - _CHUNK)
        if kept := len(bytes(data[start:end]).rstrip(b"\0")):
            return start + kept
        end = start
    return 0


def _next_sector(offset: int) -> int:
    return -(-offset // _SECTOR) * _SECTOR


def _has_hole(data: memoryview, start: int, end: int) -> bool:
    """Whether one of the sectors that these bytes reach into is nothing but zeros, from `start` on."""
    while start < end:
        following = min(_next_sector(start + 1), len(data))
        if following <= start:
            return False
        if not bytes(data[start:following]).strip(b"\0"):
            return True
        start = following
    return False


def _was_unsynced(number: int, segments: Sequence[SegmentFile]) -> bool:
    """Whether the records of each of these segments say that command `number` was not durable when they came."""
    for segment in segments:
        # What another epoch goes on behind was there when it began.
        said = [header.synced for header in _headers(segment) if header.synced is not None]
        if segment.epoch != segments[0].epoch or not said or max(said) >= number:
            return False
    return True


def _headers(segment: SegmentFile) -> Iterator[Header]:
    """All whose checksum is right, wherever they lie."""
    data = mapped(segment.path)
    seed, content = seed_of(data[:START_BYTES]), data.obj
    if not isinstance(content, mmap):
        return  # There is nothing in it.
    offset = content.find(BEGIN, START_BYTES)
    while 0 <= offset <= len(data) - HEADER_BYTES:
        with suppress(BadRecord):
            yield decode_header(data[offset:], seed)
        offset = content.find(BEGIN, offset + 1)
