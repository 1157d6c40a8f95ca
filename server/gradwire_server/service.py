"""The service as one thing: its parts put together, started, drained and closed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gradwire_server.admission import Admission
from gradwire_server.config import ServerConfig
from gradwire_server.function_host import FunctionHost
from gradwire_server.grpc_server import GrpcServer
from gradwire_server.model_registry import ModelRegistry
from gradwire_server.rpc_handlers import generic_handler
from gradwire_server.server_info import ServerFacts
from gradwire_server.servicer import Servicer
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.workers import Cluster


class Service:
    """Everything between the socket and the ranks. `folder` is private, in shared memory, and the service's alone."""

    def __init__(self, cluster: Cluster, folder: Path, config: ServerConfig) -> None:
        limits = config.limits
        self._listen = config.listen
        self._admission = Admission(limits.requests_in_flight)
        self._tensors = TensorStore(folder, limits)
        self._models = ModelRegistry(cluster, self._tensors, limits, config.stored_replies, config.delete_seconds)
        self._functions = FunctionHost(cluster, self._tensors, limits, config.delete_seconds)
        facts = ServerFacts(cluster, limits)
        servicer = Servicer(self._models, self._functions, self._tensors, facts, limits)
        handler = generic_handler(servicer, self._admission, limits.message_bytes, config.stall_seconds)
        self._server = GrpcServer(handler, limits.message_bytes)

    async def start(self) -> int:
        """Serve; returns the port. Raises Unavailable ADDRESS_IN_USE."""
        return await self._server.start(self._listen)

    async def drain(self) -> None:
        """Take no new requests, and return when all that came before have ended."""
        await self._server.announce_stop()
        self._admission.drain()
        await self._admission.idle()
        # Work goes on without callers: a command that was begun ends.
        await asyncio.gather(self._models.idle(), self._functions.idle())

    async def close(self) -> None:
        """End everything: cut requests, delete models, remove files."""
        await self._server.stop(0)
        await asyncio.gather(self._models.close(), self._functions.close())
        self._tensors.close()
