"""The files of a journal: which there are, and what each may hold.

A segment `<epoch>-<first number>.log` is a header and records without gaps. A frontend that starts, or a journal that
goes on after a failure, writes to a new one; what an earlier segment holds from the first number of a later one on was
never acknowledged, and is not read. Commands that were refused and have no number stand behind the one before them,
whatever begins behind that.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.storage_errors import journal_corrupt

_NAME = re.compile(r"(\d+)-(\d+)\.log")
_START = struct.Struct("<8sIQQ")
_CHECK = struct.Struct("<I4s")
_BEGIN = b"GWJOURNL"
_END = b"LOG\n"
_VERSION = 1

START_BYTES = _START.size + _CHECK.size


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A segment by its name. `until`: the first number of a later segment; None for the last one."""

    path: Path
    epoch: int
    first: int
    until: int | None = None


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


def check_start(segment: SegmentFile, data: memoryview) -> None:
    """Raise unless `data` begins with the header of that segment: JOURNAL_CORRUPT, STORAGE_VERSION."""
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


def needed(segment: SegmentFile, after: int) -> bool:
    """Whether the segment may hold a command behind `after`."""
    return segment.until is None or (segment.until > after + 1 and segment.until > segment.first)
