"""The messages of UploadTensors and DownloadTensors. Those that hold bytes are passed by as views of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from gradwire_proto.chunks import ChunkFormat
from gradwire_proto.codec import decode_tensor_type
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.names import check_upload_id, upload_name
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.request_parsing import parse_one
from gradwire_server.tensors.held_files import TensorType

MOST_TENSORS = 65_536
"""Of one upload."""

_MANIFEST_BYTES = 2 << 20
"""Of their types and shapes: nobody else is answered while they are read."""

_UPLOAD = ChunkFormat(pb.UploadTensorsRequest)
_DOWNLOAD = ChunkFormat(pb.DownloadTensorsResponse)


def parse_upload(raw: bytes) -> pb.UploadTensorsRequest | memoryview:
    """A message of UploadTensors: a manifest, or the bytes of a chunk. InvalidArgument for one that is none."""
    chunk = _UPLOAD.chunk(raw)
    if chunk is not None:
        return chunk
    if len(raw) > _MANIFEST_BYTES:
        message = f"a manifest has at most {_MANIFEST_BYTES} bytes, got {len(raw)}"
        raise InvalidArgument(message, field="manifest", reason="MANIFEST_TOO_LARGE")
    return parse_one(pb.UploadTensorsRequest, raw)


async def read_manifest(
    requests: AsyncIterator[pb.UploadTensorsRequest | memoryview], limits: Limits
) -> tuple[list[TensorType], str | None]:
    """The tensors that the first message of an upload announces, and the name that the client wants it to have."""
    request = await anext(requests, None)
    if request is None or isinstance(request, memoryview) or request.WhichOneof("kind") != "manifest":
        raise InvalidArgument("the first message must be the manifest", field="manifest", reason="MANIFEST_MISSING")
    return decode_manifest(request.manifest, limits)


def decode_manifest(manifest: pb.UploadManifest, limits: Limits) -> tuple[list[TensorType], str | None]:
    """The tensors of an upload, and its name where the client has chosen one."""
    if len(manifest.tensors) > MOST_TENSORS:
        message = f"expected at most {MOST_TENSORS} tensors, got {len(manifest.tensors)}"
        raise InvalidArgument(message, field="manifest.tensors", reason="MANIFEST_TOO_LARGE")
    types = [
        TensorType(*decode_tensor_type(header.dtype, header.shape, f"manifest.tensors[{index}]", limits))
        for index, header in enumerate(manifest.tensors)
    ]
    upload_id = check_upload_id(manifest.upload_id)
    return types, None if upload_id is None else upload_name(upload_id)


async def read_chunks(requests: AsyncIterator[pb.UploadTensorsRequest | memoryview]) -> AsyncIterator[memoryview]:
    """The bytes of all further messages."""
    async for request in requests:
        if isinstance(request, memoryview):
            yield request
        elif request.WhichOneof("kind") == "chunk":
            yield memoryview(request.chunk)
        else:
            raise InvalidArgument("expected bytes after the manifest", field="chunk", reason="CHUNK_MISSING")


async def encode_chunks(chunks: AsyncGenerator[list[memoryview], None]) -> AsyncGenerator[bytes]:
    """The messages of a download, serialized."""
    async with aclosing(chunks) as groups:
        async for pieces in groups:
            yield _DOWNLOAD.message(pieces, sum(map(len, pieces)))
