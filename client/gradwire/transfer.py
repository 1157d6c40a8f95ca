"""Moves tensors that are too many for one message: streamed ahead of the request, or fetched after the reply.

By shared memory where the service is on this machine. By gRPC nothing is copied as a whole: uploads are cut from the
tensors' own memory, downloads written straight into the results'.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gradwire.deadline import Deadline
from gradwire.errors import InternalError
from gradwire.local_transport import FETCHED_BYTES, SHARED_BYTES, upload_manifest
from gradwire.rpc import Rpc, new_request_id
from gradwire_proto.chunks import ChunkFormat
from gradwire_proto.names import handle_name, upload_name
from gradwire_proto.tensors import to_torch, torch_dtype
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Handle, Segment, TensorData, map_leaves

INLINE_BYTES = 4 << 20
"""Tensors that have more bytes than this together travel apart from their request or reply, by gRPC."""

CHUNK_BYTES = 1 << 20
"""Bytes of one message of a stream."""

_UPLOAD = ChunkFormat(pb.UploadTensorsRequest)
_DOWNLOAD = ChunkFormat(pb.DownloadTensorsResponse)


class Uploads:
    """What one request brings to the service ahead of it, and `deadline`, by which the whole call ends: a new one
    where none is given. The names are the client's choice, so that the tensors can be sent again for the same request
    where the service has lost them: they are kept as long as this is.

    for_read: whether the request changes nothing. What comes ahead of a command is kept in a file beside the journal,
    which costs more than shared memory saves where it is little.
    """

    def __init__(self, rpc: Rpc, deadline: Deadline | None = None, *, for_read: bool = False) -> None:
        self.deadline = Deadline(rpc.timeout) if deadline is None else deadline
        self._rpc = rpc
        self._for_read = for_read
        self._sent: list[tuple[str, list[TensorData]]] = []

    def send_apart(self, values: Sequence[Any]) -> Sequence[Any]:
        """`values` (nested, with TensorData leaves) as they should stand in the request.

        Where they have too many bytes in sum, the tensors are uploaded first and replaced by their handles.
        """
        found: list[TensorData] = []
        for value in values:
            _collect(value, found)
        if sum(tensor.nbytes for tensor in found) <= self._inline_bytes:
            return values
        upload_id = new_request_id()
        self._bring(upload_id, found)
        self._sent.append((upload_id, found))
        handles = iter(
            TensorData(item.dtype, item.shape, Handle(handle_name(upload_name(upload_id), index)))
            for index, item in enumerate(found)
        )
        return [map_leaves(lambda leaf: next(handles) if isinstance(leaf, TensorData) else leaf, it) for it in values]

    @property
    def _inline_bytes(self) -> int:
        return SHARED_BYTES if self._for_read and self._rpc.local.is_connected else INLINE_BYTES

    def _bring(self, upload_id: str, tensors: list[TensorData]) -> None:
        if not self._rpc.local.upload(upload_id, tensors, self.deadline):
            self._rpc.upload(partial(_upload_messages, upload_id, tensors), self.deadline)

    def send_again(self, deadline: Deadline) -> None:
        """Upload all once more, under the same names, until `deadline`, however it moves. What is there stays.

        By gRPC, which says what is wrong: through shared memory it may have been refused.
        """
        for upload_id, tensors in self._sent:
            self._rpc.upload(partial(_upload_messages, upload_id, tensors), deadline, may_take_longer=False)

    def own_tensors(self) -> None:
        """Keep copies from here on: the memory that was given may change."""
        self._sent = [(upload_id, list(map(_copied, tensors))) for upload_id, tensors in self._sent]


def inline_bytes(rpc: Rpc) -> int:
    """Tensors that have more bytes than this together travel apart from their reply."""
    return FETCHED_BYTES if rpc.local.is_connected else INLINE_BYTES


def receive(rpc: Rpc, values: Sequence[Any]) -> list[Any]:
    """`values` of one reply with torch tensors on the CPU in place of TensorData, each with memory of its own."""
    found: list[TensorData] = []
    for value in values:
        _collect(value, found)
    fetched = _fetch(rpc, [tensor for tensor in found if isinstance(tensor.data, Handle)])

    def as_torch(leaf: Any) -> Any:
        if not isinstance(leaf, TensorData):
            return leaf
        return fetched[leaf.data.name] if isinstance(leaf.data, Handle) else to_torch(leaf, writable=True)

    return [map_leaves(as_torch, value) for value in values]


def _collect(value: Any, found: list[TensorData]) -> None:
    if isinstance(value, TensorData):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def _copied(tensor: TensorData) -> TensorData:
    assert not isinstance(tensor.data, (Segment, Handle))
    return replace(tensor, data=bytes(tensor.data))


def _upload_messages(upload_id: str, tensors: Sequence[TensorData]) -> Iterator[bytes]:
    yield pb.UploadTensorsRequest(manifest=upload_manifest(upload_id, tensors)).SerializeToString()
    for pieces in _chunks(tensor.data for tensor in tensors):
        yield _UPLOAD.message(pieces, sum(map(len, pieces)))


def _chunks(buffers: Iterable[Any]) -> Iterator[list[memoryview]]:
    """The bytes of all buffers, in pieces that have CHUNK_BYTES together; small buffers share them."""
    pieces: list[memoryview] = []
    room = CHUNK_BYTES
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while len(view):
            piece, view = view[:room], view[room:]
            pieces.append(piece)
            room -= len(piece)
            if not room:
                yield pieces
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield pieces


def _fetch(rpc: Rpc, tensors: Sequence[TensorData]) -> dict[str, torch.Tensor]:
    """The downloaded tensors, by handle."""
    downloads: dict[str, list[tuple[int, str, TensorData]]] = {}
    for tensor in tensors:
        assert isinstance(tensor.data, Handle)
        download, _, index = tensor.data.name.rpartition("/tensors/")
        downloads.setdefault(download, []).append((int(index), tensor.data.name, tensor))
    fetched: dict[str, torch.Tensor] = {}
    for download, members in downloads.items():
        members.sort(key=lambda member: member[0])
        kinds = [kind for _, _, kind in members]
        began = time.monotonic()
        received = rpc.local.download(download, kinds) or _stream(rpc, download, kinds, began)
        fetched |= {name: tensor for (_, name, _), tensor in zip(members, received, strict=True)}
    return fetched


def _stream(rpc: Rpc, download: str, kinds: Sequence[TensorData], since: float) -> list[torch.Tensor]:
    """The tensors of a download, by gRPC. since: from when on they are waited for, in monotonic seconds."""
    tensors = [torch.empty(kind.shape, dtype=torch_dtype(kind.dtype)) for kind in kinds]
    chunks = map(_chunk, rpc.download(pb.DownloadTensorsRequest(name=download), since))
    _fill(list(map(_memory, tensors)), chunks, download)
    return tensors


def _chunk(message: bytes) -> bytes | memoryview:
    chunk = _DOWNLOAD.chunk(message)
    return pb.DownloadTensorsResponse.FromString(message).chunk if chunk is None else chunk


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(targets: Sequence[memoryview], chunks: Iterable[bytes | memoryview], download: str) -> None:
    """Write the chunks into the targets, one after another. They must fit exactly."""
    remaining = iter([target for target in targets if len(target)])
    target = next(remaining, None)
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest):
            if target is None:
                raise InternalError(f"{download} brought more bytes than its tensors have", reason="DOWNLOAD_SIZE")
            size = min(len(target), len(rest))
            target[:size] = rest[:size]
            rest, target = rest[size:], target[size:]
            if not len(target):
                target = next(remaining, None)
    if target is not None:
        raise InternalError(f"{download} ended before its tensors were whole", reason="DOWNLOAD_SIZE")
