"""The files of a journal as they are read: which there are, what each holds, and where each ends.

A segment `<epoch>-<first number>.log` is a header and records without gaps. A frontend that starts, or a journal that
goes on after a failure, writes to a new one; what an earlier segment holds from the first number of a later one on was
never acknowledged, and is not read. Commands that were refused and have no number stand behind the one before them,
whatever begins behind that.

A power loss or a kill leaves the end of the last segment torn: the file ends inside a record, or from some sector on
there is nothing but zeros. That is no error. Whatever else does not check is JOURNAL_CORRUPT.
"""

from __future__ import annotations

import logging
import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.records import HEADER_BYTES, BadRecord, Entry, Header, decode, decode_header
from gradwire_server.storage.storage_errors import journal_corrupt, storage_error

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)-(\d+)\.log")
_START = struct.Struct("<8sIQQ")
_CHECK = struct.Struct("<I4s")
_BEGIN = b"GWJOURNL"
_END = b"LOG\n"
_VERSION = 1
_SECTOR = 512
_CHUNK = 1 << 16

START_BYTES = _START.size + _CHECK.size


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A segment by its name. `until`: the first number of a later segment; None for the last one."""

    path: Path
    epoch: int
    first: int
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry, and where its record lies: the file, and where in it, in bytes."""

    entry: Entry
    path: Path
    start: int
    end: int


def segment_path(folder: Path, epoch: int, first: int) -> Path:
    """The file of the segment that begins with command `first`; names sort as the segments were made."""
    return folder / f"{epoch:08d}-{first:012d}.log"


def list_segments(folder: Path) -> list[SegmentFile]:
    """The segments of a journal, in order, each with what the later ones leave of it."""
    found = []
    for path in folder.glob("*.log"):
        if not (name := _NAME.fullmatch(path.name)):
            raise journal_corrupt(path, 0, "this is no name of a segment")
        found.append(SegmentFile(path, int(name[1]), int(name[2])))
    found.sort(key=lambda segment: (segment.epoch, segment.first))
    return bounded(found)


def bounded(segments: Sequence[SegmentFile]) -> list[SegmentFile]:
    """The segments, which are in order, with `until` set."""
    until, result = None, []
    for segment in reversed(segments):
        result.append(SegmentFile(segment.path, segment.epoch, segment.first, until))
        until = segment.first if until is None else min(until, segment.first)
    return result[::-1]


def encode_start(epoch: int, first: int) -> bytes:
    """A segment's header."""
    start = _START.pack(_BEGIN, _VERSION, epoch, first)
    return start + _CHECK.pack(zlib.crc32(start), _END)


def seed_of(start: bytes | memoryview) -> int:
    """What the checksums of a segment's records go on from: another number for every segment."""
    return zlib.crc32(start)


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
    for segment in wanted:
        number, end = segment.first, START_BYTES
        for placed in read_segment(segment):
            number, end = placed.entry.number + 1, placed.end
            yield placed
        if segment.until is not None and number < segment.until:
            what = f"the commands {number} to {segment.until - 1} are missing: the file ends too early"
            raise journal_corrupt(segment.path, end, what)


def needed(segment: SegmentFile, after: int) -> bool:
    """Whether the segment may hold a command behind `after`."""
    return segment.until is None or (segment.until > after + 1 and segment.until > segment.first)


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


def read_segment(segment: SegmentFile) -> Iterator[Placed]:
    """The entries of one segment, which should be whole up to `until`; a torn end ends it."""
    data = _mapped(segment.path)
    written = _written(data)
    there = min(len(data), _next_sector(written))  # What follows are zeros that a whole record cannot reach into.
    if there < START_BYTES:
        return
    _check_start(segment, data)
    seed, offset, number = seed_of(data[:START_BYTES]), START_BYTES, segment.first
    while offset < written:
        ends = number == segment.until
        try:
            header = _whole_record(data[offset:], there - offset, seed)
            if header is None or (ends and not header.unnumbered):
                return
            first = header.number if header.unnumbered else header.first
            if first != (number - 1 if header.unnumbered else number):
                raise BadRecord(f"command {first} where {number} should be")
            entry = decode(header, data[offset : offset + header.nbytes], seed)
        except BadRecord as error:
            if ends:
                return  # It belongs to what was never acknowledged.
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


def _check_start(segment: SegmentFile, data: memoryview) -> None:
    begin, version, epoch, first = _START.unpack_from(data)
    check, end = _CHECK.unpack_from(data, _START.size)
    if begin != _BEGIN or end != _END or check != zlib.crc32(data[: _START.size]):
        raise journal_corrupt(segment.path, 0, "the segment's header is damaged")
    if version != _VERSION:
        raise FailedPrecondition(
            f"{segment.path} has version {version}; this service reads {_VERSION}", reason="STORAGE_VERSION"
        )
    if (epoch, first) != (segment.epoch, segment.first):
        raise journal_corrupt(segment.path, 0, f"this is segment {epoch}-{first} under another name")


def _mapped(path: Path) -> memoryview:
    """The file's bytes, which live as long as anything that refers to them does."""
    try:
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    except OSError as error:
        raise storage_error(error, f"read {path}") from error


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
