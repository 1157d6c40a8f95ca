"""The messages of UploadTensors and DownloadTensors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from gradwire_proto.codec import decode_tensor_type
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.tensors.held_files import TensorType


async def read_manifest(requests: AsyncIterator[pb.UploadTensorsRequest], limits: Limits) -> list[TensorType]:
    """The tensors that the first message of an upload announces."""
    request = await anext(requests, None)
    if request is None or request.WhichOneof("kind") != "manifest":
        raise InvalidArgument("the first message must be the manifest", field="manifest", reason="MANIFEST_MISSING")
    return [
        TensorType(*decode_tensor_type(header.dtype, header.shape, f"manifest.tensors[{index}]", limits))
        for index, header in enumerate(request.manifest.tensors)
    ]


async def read_chunks(requests: AsyncIterator[pb.UploadTensorsRequest]) -> AsyncIterator[bytes]:
    """The bytes of all further messages."""
    async for request in requests:
        if request.WhichOneof("kind") != "chunk":
            raise InvalidArgument("expected bytes after the manifest", field="chunk", reason="CHUNK_MISSING")
        yield request.chunk


async def encode_chunks(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[pb.DownloadTensorsResponse]:
    """The messages of a download."""
    async with aclosing(chunks) as pieces:
        async for chunk in pieces:
            yield pb.DownloadTensorsResponse(chunk=chunk)
