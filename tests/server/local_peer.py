"""A client on the service's machine by hand, packet by packet."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from gradwire_proto import codec
from gradwire_proto.local_wire import new_socket, receive_packet, send_packet
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2
from gradwire_proto.values import TensorData


def upload(upload_id: str, *tensors: TensorData) -> local_pb2.LocalRequest:
    manifest = pb.UploadManifest(upload_id=upload_id)
    for tensor in tensors:
        message = codec.encode_tensor(tensor)
        manifest.tensors.add(dtype=message.dtype, shape=message.shape)
    return local_pb2.LocalRequest(upload=local_pb2.LocalUpload(manifest=manifest))


class Peer:
    """A client by hand."""

    def __init__(self, path: str) -> None:
        self.socket = new_socket()
        self.socket.settimeout(5)
        self.socket.connect(path)

    async def ask(self, request: Any, *files: int) -> tuple[local_pb2.LocalReply, list[int]]:
        """The reply and its files."""
        send_packet(self.socket, request, files)
        return await asyncio.to_thread(receive_packet, self.socket, local_pb2.LocalReply)

    async def upload(self, upload_id: str, file: int, *tensors: TensorData) -> local_pb2.LocalReply:
        """Send a file, which is closed here."""
        try:
            return (await self.ask(upload(upload_id, *tensors), file))[0]
        finally:
            os.close(file)

    async def download(self, name: str) -> tuple[local_pb2.LocalReply, list[int]]:
        """Ask for a download."""
        return await self.ask(local_pb2.LocalRequest(download=local_pb2.LocalDownload(name=name)))

    async def is_cut_off(self) -> bool:
        """Whether the service has hung up, or does so within a second."""
        self.socket.settimeout(1)
        try:
            return not await asyncio.to_thread(self.socket.recv, 1)
        except ConnectionError:
            return True
        except TimeoutError:
            return False


async def socket_of(frontend: Any) -> str:
    return (await frontend.stub.GetServerInfo(pb.GetServerInfoRequest())).local_socket
