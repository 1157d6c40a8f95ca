"""Ports to listen on."""

from __future__ import annotations

import grpc

from gradwire_proto.errors import Unavailable


def add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Have `server` listen on HOST:PORT; the port. credentials: None for plain text.

    Raises Unavailable ADDRESS_IN_USE where that cannot be.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise Unavailable(f"cannot listen on {address}: is it taken?", reason="ADDRESS_IN_USE") from None
