"""Moves tensors that are too many for one message: streamed ahead of the request, or fetched after the reply.

Nothing is copied as a whole: uploads are cut from the tensors' own memory, downloads written straight into the
results'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from gradwire.errors import InternalError
from gradwire.rpc import Rpc
from gradwire_proto.encoding.enum_words import DTYPES
from gradwire_proto.tensors import to_torch, torch_dtype
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Handle, TensorData, map_leaves

INLINE_BYTES = 4 << 20
"""Tensors that have more bytes than this together travel apart from their request or reply."""

CHUNK_BYTES = 1 << 20
"""Bytes of one message of a stream."""


def send_apart(rpc: Rpc, values: Sequence[Any]) -> Sequence[Any]:
    """`values` (nested, with TensorData leaves) as they should stand in one request.

    Above INLINE_BYTES in sum the tensors are uploaded first and replaced by their handles. When this returns, the
    memory of the tensors has been read.
    """
    found: list[TensorData] = []
    for value in values:
        _collect(value, found)
    if sum(tensor.nbytes for tensor in found) <= INLINE_BYTES:
        return values
    name = rpc.upload(_upload_messages(found)).name
    handles = iter([TensorData(item.dtype, item.shape, Handle(f"{name}/tensors/{i}")) for i, item in enumerate(found)])
    return [map_leaves(lambda leaf: next(handles) if isinstance(leaf, TensorData) else leaf, value) for value in values]


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


def _upload_messages(tensors: Sequence[TensorData]) -> Iterator[pb.UploadTensorsRequest]:
    manifest = pb.UploadManifest()
    for tensor in tensors:
        manifest.tensors.add(dtype=DTYPES.number(tensor.dtype, "dtype"), shape=tensor.shape)
    yield pb.UploadTensorsRequest(manifest=manifest)
    for chunk in _chunks(tensor.data for tensor in tensors):
        yield pb.UploadTensorsRequest(chunk=chunk)


def _chunks(buffers: Iterable[Any]) -> Iterator[bytes]:
    """The bytes of all buffers, in pieces of CHUNK_BYTES; small buffers share a piece."""
    pieces: list[memoryview] = []
    room = CHUNK_BYTES
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while len(view):
            piece, view = view[:room], view[room:]
            pieces.append(piece)
            room -= len(piece)
            if not room:
                yield b"".join(pieces)
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield b"".join(pieces)


def _fetch(rpc: Rpc, tensors: Sequence[TensorData]) -> dict[str, torch.Tensor]:
    """The downloaded tensors, by handle."""
    downloads: dict[str, list[tuple[int, str, TensorData]]] = {}
    for tensor in tensors:
        assert isinstance(tensor.data, Handle)
        download, _, index = tensor.data.name.rpartition("/tensors/")
        downloads.setdefault(download, []).append((int(index), tensor.data.name, tensor))
    fetched = {}
    for download, members in downloads.items():
        targets = []
        for _, name, tensor in sorted(members, key=lambda member: member[0]):
            fetched[name] = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            targets.append(_memory(fetched[name]))
        messages = rpc.download(pb.DownloadTensorsRequest(name=download))
        _fill(targets, (message.chunk for message in messages), download)
    return fetched


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(targets: Sequence[memoryview], chunks: Iterable[bytes], download: str) -> None:
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
