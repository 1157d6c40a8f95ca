"""Memory in which the batches of steps lie for the ranks of a model on this machine, instead of in their messages.

What travels over a socket is copied into the kernel and out again, and wakes a thread of ZeroMQ's at both ends; a file
in shared memory is written to once, and stays: fresh pages would cost as much as the copy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from gradwire_workers.frames import Frame

CAPACITY = 16 << 20
"""Bytes of one model's memory. Only those that were ever written to take room."""

LEAST_BYTES = 24 << 10
"""What has fewer bytes is sooner there in its message."""

_ALIGNMENT = 4096
_MOST_PARTS = 512
"""Buffers that are written at once at most: the kernel takes 1,024."""


class Region(NamedTuple):
    """Where the bytes of one message lie."""

    path: str
    offset: int
    nbytes: int


class StepMemory:
    """See the module. The frontend's end. new_path: names a file in the service's private folder in shared memory."""

    def __init__(self, new_path: Callable[[], str]) -> None:
        self._new_path = new_path
        self._path = ""
        self._file = -1
        self._used: list[Region] = []
        """In order of their offsets."""

    def place(self, parts: Sequence[Frame]) -> Region | None:
        """Where these bytes lie now, one after another; None where they had better travel in their message."""
        nbytes = sum(map(len, parts))
        if nbytes < LEAST_BYTES or len(parts) > _MOST_PARTS or (index := self._gap(nbytes)) is None:
            return None
        before = self._used[index - 1] if index else None
        offset = 0 if before is None else _end(before)
        try:
            if self._file < 0:
                self._open()
            if os.pwritev(self._file, parts, offset) < nbytes:
                return None
        except OSError:  # There is no room in shared memory.
            return None
        region = Region(self._path, offset, nbytes)
        self._used.insert(index, region)
        return region

    def free(self, region: Region) -> None:
        """Whoever was to read it has."""
        self._used.remove(region)

    def close(self) -> None:
        """Let it go. Ranks that have mapped it keep what they have."""
        if self._file >= 0:
            os.close(self._file)
            with suppress(OSError):
                os.unlink(self._path)
            self._file = -1

    def _gap(self, nbytes: int) -> int | None:
        """The first place among the used regions before which so many bytes fit: what was used last is still near."""
        start = 0
        for index, region in enumerate(self._used):
            if region.offset - start >= nbytes:
                return index
            start = _end(region)
        return len(self._used) if CAPACITY - start >= nbytes else None

    def _open(self) -> None:
        path = self._new_path()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._path = path
        os.ftruncate(self._file, CAPACITY)


class MappedMemory:
    """A rank's end: the files of such memory that it has seen."""

    def __init__(self) -> None:
        self._mapped: dict[str, memoryview] = {}

    def view(self, region: Sequence[str | int]) -> memoryview:
        """The bytes of a region, for as long as its message is not answered. `region`: as in its message."""
        path, offset, nbytes = Region(*region)  # pyright: ignore[reportArgumentType]
        mapped = self._mapped.get(path)
        if mapped is None:
            with open(path, "rb", buffering=0) as file:
                mapped = self._mapped[path] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return mapped[offset : offset + nbytes]


def _end(region: Region) -> int:
    return region.offset + -(-region.nbytes // _ALIGNMENT) * _ALIGNMENT
