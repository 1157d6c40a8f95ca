"""The messages of UploadTensors and DownloadTensors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from gradwire_proto.codec import decode_tensor_type
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.names import check_upload_id, upload_name
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.tensors.held_files import TensorType


async def read_manifest(
    requests: AsyncIterator[pb.UploadTensorsRequest], limits: Limits
) -> tuple[list[TensorType], str | None]:
    """The tensors that the first message of an upload announces, and the name that the client wants it to have."""
    request = await anext(requests, None)
    if request is None or request.WhichOneof("kind") != "manifest":
        raise InvalidArgument("the first message must be the manifest", field="manifest", reason="MANIFEST_MISSING")
    return decode_manifest(request.manifest, limits)


def decode_manifest(manifest: pb.UploadManifest, limits: Limits) -> tuple[list[TensorType], str | None]:
    """The tensors of an upload, and its name where the client has chosen one."""
    types = [
        TensorType(*decode_tensor_type(header.dtype, header.shape, f"manifest.tensors[{index}]", limits))
        for index, header in enumerate(manifest.tensors)
    ]
    upload_id = check_upload_id(manifest.upload_id)
    return types, None if upload_id is None else upload_name(upload_id)


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
