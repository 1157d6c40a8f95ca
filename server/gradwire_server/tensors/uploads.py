"""Tensors that come ahead of the request that uses them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from gradwire_proto.errors import InvalidArgument, ModelNotFound
from gradwire_proto.values import Handle, Limits, TensorData, leaves, map_leaves
from gradwire_server.aging import Aging
from gradwire_server.tensors.file_threads import CHUNK_BYTES, move_bytes
from gradwire_server.tensors.held_bytes import HeldBytes
from gradwire_server.tensors.held_files import TensorType, UploadFile
from gradwire_server.tensors.sealed_files import SealedFile

T = TypeVar("T")

_MOST_USED = 4096
"""Names that are remembered of uploads that were used."""


@dataclass(slots=True)
class _Upload:
    """An upload that is complete. It is discarded when each tensor was used, or it expired, and no claim is open."""

    tensors: list[TensorData]
    nbytes: int
    unused: set[int]
    timer: asyncio.TimerHandle
    discard: Callable[[], None]
    is_streamed: bool = False
    claims: int = 0


@dataclass(slots=True)
class Claim(Generic[T]):
    """A nested value whose handles have become segments. End it with `spend` or, if it was not used, `give_back`."""

    value: T
    uploads: Uploads
    taken: dict[str, set[int]] = field(default_factory=dict)

    @property
    def used(self) -> dict[str, list[TensorData]]:
        """All tensors of the uploads that it uses some of, by the upload's name."""
        return {name: self.uploads.tensors(name) for name in self.taken}

    def spend(self) -> None:
        """The tensors were used: they can go."""
        self.uploads.end_claim(self.taken, unused=False)
        self.taken = {}

    def give_back(self) -> None:
        """The tensors were not used: the handles are good again."""
        self.uploads.end_claim(self.taken, unused=True)
        self.taken = {}


class Uploads:
    """Complete uploads by name, in files of `folder`. Each waits `limits.held_seconds` for the requests that use it."""

    def __init__(self, folder: Path, limits: Limits, held: HeldBytes) -> None:
        self._folder = folder
        self._limits = limits
        self._held = held
        self._complete: dict[str, _Upload] = {}
        self._used: Aging[None] = Aging(_MOST_USED, time.time)
        """Names of those that came in a stream, and were used."""

    async def take(
        self, types: Sequence[TensorType], chunks: AsyncIterator[memoryview], name: str | None = None
    ) -> str:
        """Take the bytes of tensors; returns "uploads/{upload}". Whatever goes wrong, nothing of it stays.

        name: what it is to be called; one of that name that is complete is answered as it is, without reading `chunks`.
        """
        if name is not None and self._is_repeat(name, types):
            return name
        nbytes = sum(kind.nbytes for kind in types)
        self._held.reserve(nbytes)
        file = None
        try:
            file = UploadFile(self._folder, types)
            async for chunk in chunks:
                # Where it comes in pieces of the usual size, a hop to a thread costs more than the write.
                await move_bytes(len(chunk) if len(chunk) > CHUNK_BYTES else 0, file.write, chunk)
            tensors = file.finish()
        except BaseException:
            if file is not None:
                file.discard()
            self._held.release(nbytes)
            raise
        name = name or f"uploads/{secrets.token_hex(16)}"
        if name in self._complete:
            # A repeat came while the first one, whose client is gone, was not known to be cut off; or the other way.
            file.discard()
            self._held.release(nbytes)
            return name
        self._add(name, tensors, nbytes, file.discard)
        self._complete[name].is_streamed = True
        return name

    def adopt(self, types: Sequence[TensorType], file: SealedFile, name: str, discarded: Callable[[], None]) -> None:
        """Make an upload of tensors that are complete in their file, which it takes over; `discarded` tells its end.

        One of that name that is complete stays as it is. Nothing is kept of what was late: was brought again in a
        stream meanwhile, and used.
        """

        def discard() -> None:
            file.close()
            discarded()

        try:
            if self._is_repeat(name, types) or name in self._used:
                return discard()
            self._held.reserve(file.nbytes)
        except BaseException:
            discard()
            raise
        self._add(name, file.tensors, file.nbytes, discard)

    def _add(self, name: str, tensors: list[TensorData], nbytes: int, discard: Callable[[], None]) -> None:
        self._complete[name] = _Upload(tensors, nbytes, set(range(len(tensors))), self._timer(name), discard)

    def _is_repeat(self, name: str, types: Sequence[TensorType]) -> bool:
        upload = self._complete.get(name)
        if upload is None:
            return False
        if [(kind.dtype, kind.shape) for kind in types] != [(each.dtype, each.shape) for each in upload.tensors]:
            raise InvalidArgument(
                f"{name} is complete, with other tensors", field="manifest.upload_id", reason="UPLOAD_ID_REUSED"
            )
        return True

    def claim(self, value: T, field: str = "") -> Claim[T]:
        """`value` with every handle in it turned into the segment of the uploaded tensor, for one request.

        Raises ModelNotFound UPLOAD_NOT_FOUND for a handle that is unknown, used or expired. `field` is the path of
        `value` in the request.
        """
        claim = Claim(value, self)
        if not _has_handle(value):
            return claim
        resolved: dict[str, TensorData] = {}
        try:
            for path, tensor in leaves(value, field):
                if not _has_handle(tensor):
                    continue
                if tensor.data.name not in resolved:
                    resolved[tensor.data.name] = self._resolve(tensor.data, path, claim.taken)
                _check_same_type(tensor, resolved[tensor.data.name], path)
        except BaseException:
            claim.give_back()
            raise
        claim.value = map_leaves(lambda leaf: resolved[leaf.data.name] if _has_handle(leaf) else leaf, value)
        return claim

    def tensors(self, name: str) -> list[TensorData]:
        """Those of a complete upload."""
        return self._complete[name].tensors

    def _resolve(self, handle: Handle, path: str, taken: dict[str, set[int]]) -> TensorData:
        name, _, index_text = handle.name.rpartition("/tensors/")
        index = int(index_text)
        upload = self._complete.get(name)
        if upload is None or index not in upload.unused:
            raise ModelNotFound(
                f"no uploaded tensor {handle.name}: each can be used by one request, and one that is not used expires"
                f" after {self._limits.held_seconds:g} s (the server's setting held_seconds)",
                field=path,
                reason="UPLOAD_NOT_FOUND",
            )
        upload.unused.remove(index)
        if name not in taken:
            taken[name] = set()
            upload.claims += 1
        taken[name].add(index)
        return upload.tensors[index]

    def end_claim(self, taken: dict[str, set[int]], *, unused: bool) -> None:
        """End a claim. See Claim."""
        for name, indices in taken.items():
            upload = self._complete.get(name)
            if upload is None:  # The service closes.
                continue
            upload.claims -= 1
            if unused:
                upload.unused |= indices
                # The wait in a queue is over: the caller has the whole time again to come back.
                upload.timer.cancel()
                upload.timer = self._timer(name)
            elif not upload.unused:
                if upload.is_streamed:
                    self._used.add(name, None, time.time())
                self._drop(name)

    def _expire(self, name: str) -> None:
        self._complete[name].unused.clear()
        self._drop(name)

    def _drop(self, name: str) -> None:
        upload = self._complete[name]
        if upload.claims:
            return
        del self._complete[name]
        upload.timer.cancel()
        self._held.release(upload.nbytes)
        upload.discard()

    def _timer(self, name: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._limits.held_seconds, self._expire, name)

    def close(self) -> None:
        """Remove every upload."""
        for name in list(self._complete):
            self._complete[name].claims = 0
            self._drop(name)


def _has_handle(value: Any) -> bool:
    if isinstance(value, TensorData):
        return isinstance(value.data, Handle)
    if isinstance(value, dict):
        return any(map(_has_handle, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_has_handle, value))


def resolve(value: T, uploads: Mapping[str, Sequence[TensorData]]) -> T:
    """`value` with every handle in it turned into the tensor that it names of `uploads`."""

    def tensor(leaf: Any) -> Any:
        if not _has_handle(leaf):
            return leaf
        name, _, index = leaf.data.name.rpartition("/tensors/")
        return uploads[name][int(index)]

    return map_leaves(tensor, value)


def _check_same_type(asked: TensorData, uploaded: TensorData, path: str) -> None:
    if (asked.dtype, asked.shape) != (uploaded.dtype, uploaded.shape):
        raise InvalidArgument(
            f"the upload has {uploaded.dtype}{list(uploaded.shape)}, got {asked.dtype}{list(asked.shape)}",
            field=path,
            reason="UPLOAD_TYPE_MISMATCH",
        )
