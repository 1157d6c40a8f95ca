"""The gRPC server: options, the service, health and reflection."""

from __future__ import annotations

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from gradwire_server.health.health_service import Health
from gradwire_server.ports import add_port
from gradwire_server.rpc_handlers import SERVICE

LARGEST_MESSAGE = (1 << 31) - 1


def server_options(message_bytes: int) -> list[tuple[str, int]]:
    """Options of the server's channels."""
    return [
        # A port that another process serves on is an error, not a share of its connections.
        ("grpc.so_reuseport", 0),
        # Twice the setting: what is a little too large gets our error, which names the setting, and not only grpc's.
        ("grpc.max_receive_message_length", min(2 * message_bytes, LARGEST_MESSAGE)),
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        # How far a client may send ahead of what is read. Left to measure the connection itself, grpc lets it grow to
        # hundreds of MiB when this process is slow for a moment.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4 << 20),
        ("grpc.http2.max_frame_size", 1 << 20),
        # Clients ping to notice a frozen service; that is no abuse.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        # A client whose machine went away is noticed within a minute and a half; its queued requests go with it.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 30_000),
    ]


def age_options(seconds: float | None, grace_seconds: float) -> list[tuple[str, int]]:
    """Options of a server whose connections end at this age: new calls go over others, and those that run have so many
    seconds more. None: at any age.
    """
    if seconds is None:
        return []
    return [
        ("grpc.max_connection_age_ms", int(1000 * seconds)),
        ("grpc.max_connection_age_grace_ms", int(1000 * grace_seconds)),
    ]


class GrpcServer:
    """A server that answers health checks and reflection beside GradientService."""

    def __init__(
        self, handler: grpc.GenericRpcHandler, message_bytes: int, health_service: Health, age: list[tuple[str, int]]
    ) -> None:
        """age: see `age_options`."""
        self._server = grpc.aio.server(options=[*server_options(message_bytes), *age])
        self._server.add_generic_rpc_handlers((handler,))
        self._health = health_service
        health_service.add_to(self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, descriptor_pool.Default())

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serve on HOST:PORT; returns the port. credentials: None for plain text. Raises Unavailable ADDRESS_IN_USE."""
        port = add_port(self._server, address, credentials)
        await self._health.publish()
        await self._server.start()
        return port

    async def stop(self, grace: float) -> None:
        """Take no more connections; cut RPCs that have not ended after `grace` seconds."""
        await self._server.stop(grace)
