"""Segments: files in the service's private shared-memory folder that carry big tensors between its processes.

One file holds all tensors of one message. Whoever receives a message owns the files that it names, and unlinks them.
A file that a rank makes starts with the rank's name, so that a dead rank's files can be found.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.lent_files import take_back
from gradwire_proto.values import Segment, TensorData, map_leaves, tensors_in

INLINE_BYTES = 1 << 20
"""Tensors that together have fewer bytes than this travel in the message itself."""

# Tensor libraries like cache-line alignment; mmap starts at a page.
_ALIGNMENT = 64

# Bytes from which on the pages of a file are worth more than the search for it, and how many files are remembered.
_WORTH_KEEPING = 256 << 10
_FORMER = 4


class SegmentWriter:
    """Makes files `<folder>/<name>-<number>`, readable by this user alone. Any thread may write."""

    def __init__(self, folder: str | Path, name: str) -> None:
        self._folder = str(folder)
        self._name = name
        # Threads share a writer: taking the next number is one step.
        self._numbers = itertools.count(1)
        self._former: deque[str] = deque(maxlen=_FORMER)

    def write(self, tensors: Iterable[TensorData], sizes: Sequence[int] | None = None) -> list[TensorData]:
        """The same tensors with their bytes in one file of their own.

        sizes: the bytes of each, where `tensors` makes them one by one so that not all take memory at once.
        ResourceExhausted (MEMORY_FOLDER_FULL) when there is no room; then no file is left behind.
        """
        if sizes is None:
            tensors = list(tensors)
            sizes = [tensor.nbytes for tensor in tensors]
        file, path = self._open(_size(sizes))
        try:
            return list(_write_all(file, path, tensors))
        except BaseException as error:
            os.unlink(path)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    f"the service's shared-memory folder {self._folder} is full", reason="MEMORY_FOLDER_FULL"
                ) from error
            raise
        finally:
            os.close(file)

    def new_path(self) -> str:
        """The name of a file that nobody has had."""
        return os.path.join(self._folder, f"{self._name}-{next(self._numbers)}")

    def _open(self, size: int) -> tuple[int, str]:
        """(descriptor, path) of a file that is nobody else's: one that was lent to a client before, or a new one."""
        path = self.new_path()
        for former in list(self._former):
            file = take_back(former, size, path)
            if file is not None:
                with contextlib.suppress(ValueError):  # Another thread has found that it is gone.
                    self._former.remove(former)
                break
        else:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if size >= _WORTH_KEEPING:
            self._former.append(path)
        return file, path

    def adopt(self, value: Any) -> Any:
        """The same nested value with the files that it names renamed to this writer's: they outlive who made them."""
        renamed = {}
        for path in _paths(value):
            renamed[path] = self.new_path()
            os.rename(path, renamed[path])

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, TensorData) or not isinstance(leaf.data, Segment):
                return leaf
            return replace(leaf, data=replace(leaf.data, path=renamed[leaf.data.path]))

        return map_leaves(moved, value)


def _write_all(file: int, path: str, tensors: Iterable[TensorData]) -> Iterator[TensorData]:
    offset = end = 0
    for tensor in tensors:
        if end < offset:
            # In a file that was lent before, there are bytes of former results.
            os.pwrite(file, bytes(offset - end), end)
        position = offset
        for piece in pieces(tensor.data):
            while piece:
                written = os.pwrite(file, piece, position)
                position += written
                piece = piece[written:]
        yield TensorData(tensor.dtype, tensor.shape, Segment(path, offset, tensor.nbytes))
        end = offset + tensor.nbytes
        offset += _room(tensor.nbytes)


def _size(sizes: Sequence[int]) -> int:
    """Bytes of the file that tensors of these make. No room follows the last one."""
    return sum(map(_room, sizes[:-1])) + sum(sizes[-1:])


def _room(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def pieces(data: Any, size: int = 1 << 20) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces of at most `size`, wherever they are. Reads a segment bit by bit: no mapping."""
    if isinstance(data, Segment):
        with open(data.path, "rb", buffering=0) as file:
            file.seek(data.offset)
            left = data.nbytes
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise EOFError(f"segment {data.path} ends {left} bytes early")
                left -= len(piece)
                yield memoryview(piece)
    elif view := memoryview(data).nbytes:
        flat = memoryview(data).cast("B")
        for start in range(0, view, size):
            yield flat[start : start + size]


def release(*values: Any, keep: Any = None) -> None:
    """Unlinks every file that these values (tensors, nested values, mappings) name and `keep` does not. Never fails."""
    paths = _paths(list(values))
    if not paths:
        return
    for path in paths - _paths(keep):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _paths(value: Any) -> set[str]:
    return {tensor.data.path for tensor in tensors_in(value) if isinstance(tensor.data, Segment)}


def sweep(folder: str | Path, name: str) -> None:
    """Unlinks the files in `folder` whose name starts with `name` and a dash: those of a rank that is gone."""
    for path in Path(folder).glob(f"{name}-*"):
        path.unlink(missing_ok=True)
