"""The gRPC server: options, the service, health and reflection."""

from __future__ import annotations

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gradwire_proto.errors import Unavailable
from gradwire_server.rpc_handlers import SERVICE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
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


class GrpcServer:
    """A server that answers health checks and reflection beside GradientService."""

    def __init__(self, handler: grpc.GenericRpcHandler, message_bytes: int) -> None:
        self._server = grpc.aio.server(options=server_options(message_bytes))
        self._server.add_generic_rpc_handlers((handler,))
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, descriptor_pool.Default())

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serve on HOST:PORT; returns the port. credentials: None for plain text.

        Raises Unavailable ADDRESS_IN_USE where that cannot be.
        """
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            raise Unavailable(f"cannot listen on {address}: is it taken?", reason="ADDRESS_IN_USE") from None
        await self._server.start()
        for name in ("", SERVICE.full_name):
            await self._health.set(name, SERVING)
        return port

    async def announce_stop(self) -> None:
        """Health says NOT_SERVING from now on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Take no more connections; cut RPCs that have not ended after `grace` seconds."""
        await self._server.stop(grace)
