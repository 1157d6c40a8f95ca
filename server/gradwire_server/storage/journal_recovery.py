"""A journal read back when it is opened: how far it goes, and whether all that it names is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire_server.fingerprints import file_fingerprint
from gradwire_server.storage.blobs import Blobs
from gradwire_server.storage.durable_files import sync_file, sync_folder
from gradwire_server.storage.mapped_files import unreadable
from gradwire_server.storage.record_sizes import RecordSizes
from gradwire_server.storage.records import StoredUpload
from gradwire_server.storage.segment_reading import read_segments
from gradwire_server.storage.segments import START_BYTES, SegmentFile, list_segments, needed
from gradwire_server.storage.storage_errors import journal_corrupt, storage_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What there is of a journal behind a checkpoint.

    last: the number of the last command; the checkpoint's where there is none. end: where the records of the last
    segment end, in bytes. refused: the numbers behind which there are records without a number. unread: segments whose
    records were not looked at.
    """

    segments: Sequence[SegmentFile]
    last: int
    end: int
    sizes: RecordSizes
    refused: set[int]
    unread: Collection[Path]


def recover(folder: Path, blobs: Blobs, *, epoch: int, after: int) -> Recovered:
    """Read all that may be behind command `after`, and check it. `blobs` are told what is named.

    FailedPrecondition JOURNAL_CORRUPT; errors of `storage_error`.
    """
    found = list_segments(folder)
    if found and found[-1].epoch > epoch:
        raise journal_corrupt(found[-1].path, 0, f"a later epoch wrote it than this one, {epoch}")
    last, end, sizes, refused = after, START_BYTES, RecordSizes(after + 1), set[int]()
    whole: set[StoredUpload] = set()
    for placed in read_segments(found, after):
        entry = placed.entry
        blobs.note((upload.file for upload in entry.uploads), entry.number)
        if placed.path == found[-1].path:
            end = placed.end
        if entry.unnumbered:
            refused.add(entry.number)
        elif entry.number > after:
            # Once each: a fit names its dataset with each of its records.
            for upload in set(entry.uploads) - whole:
                _check_blob(blobs.path(upload.file), entry.number, upload)
            whole |= set(entry.uploads)
            sizes.add(placed.end - placed.start, entry.commands)
            last = entry.number
    unread = {segment.path for segment in found if not needed(segment, after)}
    return Recovered(segments=found, last=last, end=end, sizes=sizes, refused=refused, unread=unread)


def _check_blob(path: Path, number: int, upload: StoredUpload) -> None:
    try:
        there = path.stat().st_size if path.exists() else -1
        if there < max((tensor.offset + tensor.nbytes for tensor in upload.tensors), default=0):
            what = "is missing" if there < 0 else "is cut off"
        elif upload.fingerprint is not None and file_fingerprint(path) != upload.fingerprint:
            what = "is damaged: its fingerprint differs"
        else:
            return
    except OSError as error:
        if error.errno == errno.EIO:
            raise unreadable(path) from error
        raise storage_error(error, f"read {path}") from error
    raise journal_corrupt(path, max(there, 0), f"{upload.name}, which command {number} needs, {what}")


def make_durable(found: Recovered, folder: Path, blobs: Path) -> None:
    """What was read is acted on, and may have been written by one that was killed before its fsync."""
    try:
        for segment in found.segments:
            sync_file(segment.path)
        for each in (folder, blobs):
            sync_folder(each)
    except OSError as error:
        raise storage_error(error, f"make {folder} durable") from error


def cut_torn_end(found: Recovered) -> None:
    """Cut off what is behind the last record. Only once another segment is there: it says where these end."""
    if found.segments and (last := found.segments[-1].path).exists():
        os.truncate(last, min(found.end, last.stat().st_size))
