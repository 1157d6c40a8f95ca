"""Tensor bytes that the service holds for a while, in files of its private shared-memory folder.

Only shared pages hold them: what passes through here never piles up in the frontend's private memory.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.local_wire import aligned
from gradwire_proto.values import Segment, TensorData

UPLOAD_PREFIX = "upload-"
DOWNLOAD_PREFIX = "download-"


@dataclass(frozen=True, slots=True)
class TensorType:
    """Dtype and shape of a tensor that is announced before its bytes come."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return TensorData(self.dtype, self.shape, b"").nbytes


class HeldFile:
    """A new private file, written once. `discard` closes and removes it; `close` only closes it."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.path = folder / f"{prefix}{secrets.token_hex(16)}"
        self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def write(self, piece: bytes | memoryview, offset: int) -> None:
        """Write all of `piece` at `offset`. ResourceExhausted where shared memory is full."""
        try:
            written = os.pwrite(self._descriptor, piece, offset)
            while written < len(piece):
                written += os.pwrite(self._descriptor, memoryview(piece)[written:], offset + written)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ResourceExhausted(
                "the shared memory of the service is full; its folder is the setting shared_memory_dir",
                reason="SHARED_MEMORY_FULL",
                retryable=True,
            ) from None

    def truncate(self, size: int) -> None:
        """Give the file `size` bytes. What was not written reads as zeros and takes no memory."""
        os.truncate(self._descriptor, size)

    def close(self) -> None:
        """Close the descriptor; the file stays. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Close and remove. Idempotent."""
        self.close()
        self.path.unlink(missing_ok=True)


class UploadFile:
    """The tensors of one upload, taken as one run of bytes cut anywhere and laid out aligned in a file."""

    def __init__(self, folder: Path, types: Sequence[TensorType]) -> None:
        sizes = [kind.nbytes for kind in types]
        self._ends = list(accumulate(sizes))
        self._offsets, file_size = aligned(sizes)
        self._types = types
        self._received = 0
        self._current = 0
        self._file = HeldFile(folder, UPLOAD_PREFIX)
        self._file.truncate(file_size)

    @property
    def nbytes(self) -> int:
        """Bytes that are to come in all."""
        return self._ends[-1] if self._ends else 0

    def write(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes. InvalidArgument if they are more than announced, or a bool is neither 0 nor 1."""
        if self._received + len(chunk) > self.nbytes:
            raise InvalidArgument(
                f"expected {self.nbytes} bytes for the tensors of the manifest, got more",
                field="chunk",
                reason="UPLOAD_TOO_LONG",
            )
        rest = memoryview(chunk)
        while rest:
            while self._ends[self._current] == self._received:
                self._current += 1
            left = self._ends[self._current] - self._received
            piece, rest = rest[:left], rest[left:]
            self._check(piece)
            kind = self._types[self._current]
            self._file.write(piece, self._offsets[self._current] + kind.nbytes - left)
            self._received += len(piece)

    def _check(self, piece: memoryview) -> None:
        if self._types[self._current].dtype == "bool":
            check_bools(bytes(piece), self._current)

    def finish(self) -> list[TensorData]:
        """The tensors, once every byte is there. InvalidArgument UPLOAD_TOO_SHORT before."""
        if self._received != self.nbytes:
            raise InvalidArgument(
                f"expected {self.nbytes} bytes for the tensors of the manifest, got {self._received}",
                field="chunk",
                reason="UPLOAD_TOO_SHORT",
            )
        self._file.close()
        path = str(self._file.path)
        return [
            TensorData(kind.dtype, kind.shape, Segment(path, offset, kind.nbytes))
            for kind, offset in zip(self._types, self._offsets, strict=True)
        ]

    def discard(self) -> None:
        """Remove the file."""
        self._file.discard()


def check_bools(piece: bytes, index: int) -> None:
    """InvalidArgument TENSOR_NOT_BOOL where bytes of tensor `index` of a manifest are no bools."""
    if piece.translate(None, b"\x00\x01"):
        raise InvalidArgument(
            "expected bool elements of 0 or 1", field=f"manifest.tensors[{index}]", reason="TENSOR_NOT_BOOL"
        )


def write_tensors(folder: Path, tensors: Sequence[TensorData]) -> list[Segment]:
    """Put tensors that are in memory into one new file, one after another."""
    file = HeldFile(folder, DOWNLOAD_PREFIX)
    segments, offset = [], 0
    try:
        for tensor in tensors:
            assert not isinstance(tensor.data, Segment)
            piece = memoryview(tensor.data).cast("B")  # pyright: ignore[reportArgumentType]
            file.write(piece, offset)
            segments.append(Segment(str(file.path), offset, len(piece)))
            offset += len(piece)
    except BaseException:
        file.discard()
        raise
    file.close()
    return segments


def remove_files(paths: Iterable[str]) -> None:
    """Remove files; those that are gone already are fine."""
    for path in paths:
        Path(path).unlink(missing_ok=True)


def segment_paths(tensors: Iterable[TensorData]) -> set[str]:
    """The files that back some tensors."""
    return {tensor.data.path for tensor in tensors if isinstance(tensor.data, Segment)}
