"""A frontend in this process over fake ranks: milliseconds a test, and a real gRPC server on a free port."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from server.fakes import FakeCluster, FakeWorkers
from server.local_peer import Peer, socket_of
from server.small_models import model_spec, read, two_floats, variant

from gradwire_proto import codec
from gradwire_proto.errors import GradwireError
from gradwire_proto.status import from_rpc_error
from gradwire_proto.token_file import DEFAULT_OWNER
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2_grpc as pb_grpc
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import (
    Batch,
    TensorData,
)
from gradwire_server.config import ServerConfig, load_config
from gradwire_server.service import Service
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.storages import Storages
from gradwire_server.tenant import Tenant


class Frontend:
    """A running frontend, and requests to it as any client would send them."""

    def __init__(self, service: Service, cluster: FakeCluster, channel: grpc.aio.Channel, target: str, folder: Path):
        self.service = service
        self.cluster = cluster
        self.channel = channel
        self.target = target
        self.folder = folder
        self.stub: Any = pb_grpc.GradientServiceStub(channel)

    @property
    def files(self) -> list[str]:
        """What lies in shared memory."""
        return sorted(path.name for path in self.folder.iterdir())

    async def create(self, model_id: str = "m", **changes: Any) -> FakeWorkers:
        """Make a model; its ranks."""
        await self.stub.CreateModel(self.creation(model_id, **changes))
        return self.cluster.groups[model_id]

    def creation(self, model_id: str = "m", request_id: str = "", value: Any = None, **changes: Any) -> Any:
        """A request for a model."""
        request = pb.CreateModelRequest(model_id=model_id, request_id=request_id)
        codec.encode_model_spec(model_spec(**changes), request.model)
        codec.encode_named_tensors({"w": value or two_floats()}, request.tensors)
        return request

    def train(self, value: bytes | None = None, *, model_id: str = "m", request_id: str = "", lr: float = 0.1) -> Any:
        """A request for a training step; `value` tells steps apart."""
        request = pb.TrainStepRequest(name=f"models/{model_id}", request_id=request_id, learning_rate=lr)
        inputs = two_floats() if value is None else two_floats(value.ljust(8, b"\0"))
        codec.encode_batch(Batch(inputs), request.batch)
        return request

    async def upload(
        self, *tensors: TensorData, chunks: list[bytes] | None = None, pause: float = 0, upload_id: str = ""
    ) -> str:
        """Upload tensors, or other bytes under their headers."""

        async def messages() -> AsyncIterator[pb.UploadTensorsRequest]:
            manifest = pb.UploadManifest(upload_id=upload_id)
            for tensor in tensors:
                message = codec.encode_tensor(tensor)
                manifest.tensors.add(dtype=message.dtype, shape=message.shape)
            yield pb.UploadTensorsRequest(manifest=manifest)
            for chunk in [bytes(tensor.data) for tensor in tensors] if chunks is None else chunks:
                yield pb.UploadTensorsRequest(chunk=chunk)
                await asyncio.sleep(pause)

        return (await self.stub.UploadTensors(messages())).name

    async def download(self, name: str) -> bytes:
        """The bytes of a download."""
        return b"".join([r.chunk async for r in self.stub.DownloadTensors(pb.DownloadTensorsRequest(name=name))])

    @property
    def tenant(self) -> Tenant:
        """What belongs to clients without a token."""
        return self.service._tenants.of(DEFAULT_OWNER)

    async def error(self, call: Awaitable[Any]) -> GradwireError:
        """The error that a call ends with, as the SDK would raise it."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return from_rpc_error(caught.value, command=True)

    async def until(self, condition: Callable[[], Any], seconds: float = 5.0) -> None:
        """Wait until `condition()` holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.002)

    async def model(self, model_id: str = "m") -> model_pb2.Model:
        """The model's description."""
        return await self.stub.GetModel(pb.GetModelRequest(name=f"models/{model_id}"))


@asynccontextmanager
async def _running(
    folder: Path, storage: Path, settings: dict[str, Any], held: bool = False, sockets: Path | None = None
) -> AsyncIterator[Frontend]:
    config: ServerConfig = load_config(None, {"listen": "127.0.0.1:0"} | settings)
    folder.mkdir(exist_ok=True)
    cluster = FakeCluster()
    if held:
        cluster.gate.clear()
    lock = StorageLock.take(storage, 1.0)
    service = Service(cluster, folder, config, Storages(lock, None), sockets)
    target = f"127.0.0.1:{await service.start()}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield Frontend(service, cluster, channel, target, folder)
    finally:
        for group in cluster.groups.values():
            group.gate.set()
        async with asyncio.timeout(10):
            await service.close()
        lock.release()


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """`async with start(models=1) as frontend`: a frontend with these settings.

    held: no ranks start until told so. place: the name of the folder that keeps its models. sockets: where clients
    find the socket over which memory is shared.
    """

    def running(held: bool = False, place: str = "storage", sockets: Path | None = None, **settings: Any) -> Any:
        return _running(tmp_path / "held", tmp_path / place, settings, held, sockets)

    return running


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Where frontends that `start` starts keep models."""
    return tmp_path / "storage"


@pytest.fixture
async def frontend(start: Callable[..., Any]) -> AsyncIterator[Frontend]:
    """A frontend with the default settings."""
    async with start() as running:
        yield running


@pytest.fixture
async def local(start: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Any]:
    """A frontend that listens for clients of its own machine, with a model."""
    async with start(sockets=tmp_path) as frontend:
        await frontend.create()
        yield frontend


@pytest.fixture
async def peer(local: Any) -> AsyncIterator[Peer]:
    peer = Peer(await socket_of(local))
    yield peer
    peer.socket.close()


@pytest.fixture
def fakes() -> Any:
    """What tests build requests and ranks from."""
    return SimpleNamespace(
        FakeWorkers=FakeWorkers,
        two_floats=two_floats,
        model_spec=model_spec,
        variant=variant,
        read=read,
        request_id=lambda: str(uuid.uuid4()),
    )
