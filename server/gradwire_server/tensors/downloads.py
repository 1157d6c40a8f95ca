"""Tensors that wait to be fetched after the reply that names them."""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradwire_proto.errors import FailedPrecondition, ModelNotFound, ResourceExhausted
from gradwire_proto.local_wire import close_files
from gradwire_proto.values import Handle, Limits, Segment, TensorData, map_leaves, tensors_in
from gradwire_server.tensors.file_threads import CHUNK_BYTES, move_bytes
from gradwire_server.tensors.held_bytes import HeldBytes
from gradwire_server.tensors.held_files import remove_files, segment_paths, write_tensors
from gradwire_server.tensors.lent_files import LentFiles


@dataclass(slots=True)
class _Download:
    """Tensors that wait to be fetched. The files are the download's own."""

    segments: list[Segment]
    nbytes: int
    timer: asyncio.TimerHandle
    readers: int = 0


class LentPlace(NamedTuple):
    """Where a tensor lies: in which file, from where on, and how many bytes."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Lent:
    """Descriptors of a download's files, which are the caller's to close. taken: to be called when they were sent."""

    files: list[int]
    places: list[LentPlace]
    taken: Callable[[], None]


class Downloads:
    """Downloads by name, in files of `folder`. Each waits `limits.held_seconds` to be fetched."""

    def __init__(self, folder: Path, limits: Limits, held: HeldBytes) -> None:
        self._folder = folder
        self._limits = limits
        self._held = held
        self._lent = LentFiles(limits.held_bytes // 2)
        self._waiting: dict[str, _Download] = {}

    async def deliver(self, value: Any, max_inline_bytes: int | None) -> Any:
        """`value` (nested tensors) as a reply can carry it: bytes inline or, where all tensors together have more than
        `max_inline_bytes` (None: no bound), handles of a new download. Takes over the files of its segments.
        """
        tensors = tensors_in(value)
        total = sum(tensor.nbytes for tensor in tensors)
        if max_inline_bytes is not None and total > max_inline_bytes:
            handles = iter(await self._hold(tensors, total))
            return map_leaves(lambda leaf: next(handles) if isinstance(leaf, TensorData) else leaf, value)
        paths = segment_paths(tensors)
        try:
            self._check_inline(total)
            if not paths:
                return value
            loaded = iter(await move_bytes(total, _load, tensors))
            return map_leaves(lambda leaf: next(loaded) if isinstance(leaf, TensorData) else leaf, value)
        finally:
            remove_files(paths)

    def _check_inline(self, total: int) -> None:
        # A sixteenth of the message is for everything that is not tensors' bytes: names, shapes.
        if total > self._limits.message_bytes // 16 * 15:
            raise ResourceExhausted(
                f"the reply's tensors have {total} bytes, and the server's setting message_bytes allows"
                f" {self._limits.message_bytes} with all else in a message; set"
                " max_inline_bytes to fetch them with DownloadTensors",
                field="max_inline_bytes",
                reason="REPLY_TOO_LARGE",
            )

    async def _hold(self, tensors: list[TensorData], total: int) -> list[TensorData]:
        paths = segment_paths(tensors)
        try:
            self._held.reserve(total)
        except BaseException:
            remove_files(paths)
            raise
        try:
            in_memory = sum(0 if isinstance(tensor.data, Segment) else tensor.nbytes for tensor in tensors)
            segments = await move_bytes(in_memory, self._as_segments, tensors)
        except BaseException:
            self._held.release(total)
            remove_files(paths)
            raise
        name = f"downloads/{secrets.token_hex(16)}"
        self._waiting[name] = _Download(segments, total, self._timer(name))
        return [
            TensorData(tensor.dtype, tensor.shape, Handle(f"{name}/tensors/{index}"))
            for index, tensor in enumerate(tensors)
        ]

    def _as_segments(self, tensors: list[TensorData]) -> list[Segment]:
        in_memory = [t for t in tensors if not isinstance(t.data, Segment)]
        written = iter(write_tensors(self._folder, in_memory) if in_memory else ())
        return [t.data if isinstance(t.data, Segment) else next(written) for t in tensors]

    def lend(self, name: str) -> Lent:
        """The files of a download, for a client that maps them. It is gone when `taken` is called.

        Raises ModelNotFound DOWNLOAD_NOT_FOUND, and ResourceExhausted where clients keep too much already.
        """
        download = self._find(name)
        if download.readers:
            raise FailedPrecondition("it is being fetched by DownloadTensors", reason="DOWNLOAD_IN_USE")
        paths = sorted({segment.path for segment in download.segments})
        self._lent.check_room(download.nbytes, len(paths))
        files = []
        try:
            for path in paths:
                files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            close_files(files)
            raise
        places = [LentPlace(paths.index(each.path), each.offset, each.nbytes) for each in download.segments]

        def taken() -> None:
            self._drop(name, is_lent=True)

        return Lent(files, places, taken)

    def _find(self, name: str) -> _Download:
        download = self._waiting.get(name)
        if download is None:
            raise ModelNotFound(
                f"no such download: {name[:100]}; one that is not fetched expires after"
                f" {self._limits.held_seconds:g} s (the server's setting held_seconds)",
                field="name",
                reason="DOWNLOAD_NOT_FOUND",
            )
        return download

    async def chunks(self, name: str) -> AsyncGenerator[list[memoryview], None]:
        """The bytes of all tensors of a download, in chunks of some pieces each. Fetched to the end, it is gone."""
        download = self._find(name)
        download.readers += 1
        complete = False
        try:
            async for pieces in _read_chunks(download.segments):
                yield pieces
            complete = True
        finally:
            download.readers -= 1
            if complete and name in self._waiting and not download.readers:
                self._drop(name)

    def _expire(self, name: str) -> None:
        download = self._waiting[name]
        if download.readers:
            download.timer = self._timer(name)
        else:
            self._drop(name)

    def _drop(self, name: str, *, is_lent: bool = False) -> None:
        download = self._waiting.pop(name)
        download.timer.cancel()
        self._held.release(download.nbytes)
        for path in {segment.path for segment in download.segments}:
            # Nobody waits to write again to what was written here.
            if (not is_lent and Path(path).parent == self._folder) or not self._lent.lend(path):
                remove_files((path,))

    def _timer(self, name: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._limits.held_seconds, self._expire, name)

    def close(self) -> None:
        """Remove every download."""
        for name in list(self._waiting):
            self._drop(name)
        self._lent.close()


def _load(tensors: Sequence[TensorData]) -> list[TensorData]:
    files: dict[str, int] = {}
    try:
        for path in segment_paths(tensors):
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return [
            TensorData(t.dtype, t.shape, os.pread(files[t.data.path], t.data.nbytes, t.data.offset))
            if isinstance(t.data, Segment)
            else t
            for t in tensors
        ]
    finally:
        for descriptor in files.values():
            os.close(descriptor)


async def _read_chunks(segments: Sequence[Segment]) -> AsyncGenerator[list[memoryview], None]:
    """The bytes of segments, CHUNK_BYTES at a time, as views of their files; small neighbours share a chunk."""
    gathered: list[memoryview] = []
    room = CHUNK_BYTES
    files: dict[str, memoryview] = {}
    for segment in segments:
        if not segment.nbytes:
            continue
        if segment.path not in files:
            files[segment.path] = _mapped(segment.path)
        rest = files[segment.path][segment.offset : segment.offset + segment.nbytes]
        if len(rest) != segment.nbytes:
            raise OSError("a held file is shorter than its tensors")
        while rest:
            piece, rest = rest[:room], rest[room:]
            gathered.append(piece)
            room -= len(piece)
            if not room:
                yield gathered
                gathered, room = [], CHUNK_BYTES
    if gathered:
        yield gathered


def _mapped(path: str) -> memoryview:
    # Nobody else has the file: it is not lent while it is read, and was lent to nobody who still has it.
    with open(path, "rb", buffering=0) as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
