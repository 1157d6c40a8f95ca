"""The segment that a journal writes to."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

from gradwire_server.storage.disk_room import give_room_back, take_room
from gradwire_server.storage.durable_files import sync_folder
from gradwire_server.storage.segments import encode_start, seed_of

_STEP_BYTES = 1 << 20
"""Room is taken ahead in such steps, so that few records have to wait for it."""


class SegmentWriter:
    """A new segment, which replaces one of that name without records. `end`: bytes written; `kept`: how many of them
    count, and `last`: the last command among these, which are for its user to say; `seed`: see records.py.

    Its methods raise OSError. The file is closed when nothing refers to it any more: also a rolled segment is fsynced.
    """

    def __init__(self, path: Path, epoch: int, first: int) -> None:
        start = encode_start(epoch, first)
        self.path = path
        self.first = first
        self.last = first - 1
        self.seed = seed_of(start)
        self.end = 0
        self._room = 0
        path.unlink(missing_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._folder_is_synced = False
        self.close = weakref.finalize(self, os.close, self._file)
        try:
            self.write([start])
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise
        self.kept = self.end

    def reserve(self, nbytes: int) -> None:
        """Room for so many bytes more, so that writing them cannot fail for want of it."""
        end = self.end + nbytes
        if end <= self._room:
            return
        start = max(self._room, self.end)
        ahead = max(end, start + _STEP_BYTES)
        try:
            take_room(self._file, start, ahead)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._take_the_least(end)
            ahead = end
        self._room = ahead

    def _take_the_least(self, end: int) -> None:
        """What is there may do without the step; none is kept for nothing."""
        self.give_back()
        try:
            take_room(self._file, self.end, end)
        except OSError:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Free the room that was not written to."""
        give_room_back(self._file, self.end)
        self._room = self.end

    def cut(self, *, durable: bool) -> None:
        """Cut off what does not count."""
        os.ftruncate(self._file, self.kept)
        self.end = self._room = self.kept
        if durable:
            os.fsync(self._file)

    def write(self, parts: Sequence[bytes | memoryview]) -> int:
        """Write the parts behind what is there, with one system call as a rule; their bytes together."""
        nbytes = sum(map(len, parts))
        done = os.pwritev(self._file, parts, self.end)
        if done < nbytes:
            self._write_rest(parts, done)
        self.end += nbytes
        return nbytes

    def _write_rest(self, parts: Sequence[bytes | memoryview], done: int) -> None:
        """Go on after a short write: more than 2 GiB at once, or a disk that is full, which the next write tells."""
        position = self.end + done
        for part in map(memoryview, parts):
            rest, done = part[done:], max(0, done - len(part))
            while len(rest):
                count = os.pwrite(self._file, rest, position)
                if not count:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                rest, position = rest[count:], position + count

    def sync(self) -> None:
        """Return once all that was written before is durable, the file's name included."""
        os.fdatasync(self._file)
        if not self._folder_is_synced:
            sync_folder(self.path.parent)
            self._folder_is_synced = True
