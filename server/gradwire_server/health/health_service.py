"""grpc.health.v1: `live` apart from `ready`, the same answers on every port."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gradwire_server.health.readiness import Readiness
from gradwire_server.ports import add_port
from gradwire_server.rpc_handlers import SERVICE

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

LIVE = ("", "live")
"""Services that serve as long as the process answers."""

READY = ("ready", SERVICE.full_name)
"""Services that serve while nothing is missing. Each part of the readiness is a service under its own name, too."""


class Health:
    """Follows a readiness. Whoever asks for `Watch` hears of every change."""

    def __init__(self, readiness: Readiness) -> None:
        self.readiness = readiness
        self._servicer: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._publishing: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        readiness.on_change(self._begin_to_publish)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answer on this server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def publish(self) -> None:
        """Return when everybody hears how it is now."""
        async with self._one_at_a_time:
            answers = dict.fromkeys(LIVE, True) | dict.fromkeys(READY, self.readiness.is_ready)
            answers |= {part: why_not is None for part, why_not in self.readiness().items()}
            for name, serves in answers.items():
                await self._servicer.set(name, _SERVING if serves else _NOT_SERVING)

    def _begin_to_publish(self) -> None:
        task = asyncio.get_running_loop().create_task(self.publish())
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)


class HealthPort:
    """A port that answers health checks and nothing else, in plain text: for kubelets, which know no certificates."""

    def __init__(self, health_service: Health) -> None:
        self._health = health_service
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_service.add_to(self._server)

    async def start(self, address: str) -> int:
        """Serve on HOST:PORT; returns the port. Raises Unavailable ADDRESS_IN_USE."""
        port = add_port(self._server, address)
        await self._health.publish()
        await self._server.start()
        return port

    async def stop(self) -> None:
        """End at once."""
        await self._server.stop(0)
