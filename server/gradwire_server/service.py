"""The service as one thing: its parts put together, started, drained and closed."""

from __future__ import annotations

import secrets
from pathlib import Path

import grpc

from gradwire_server.config import ServerConfig
from gradwire_server.doors.certificates import Certificates
from gradwire_server.doors.door import Door
from gradwire_server.doors.token_book import TokenBook
from gradwire_server.grpc_server import GrpcServer, age_options
from gradwire_server.health.health_service import Health
from gradwire_server.health.readiness import DRAIN, Readiness
from gradwire_server.local.local_socket import SOCKET_PREFIX, LocalSocket
from gradwire_server.rpc_handlers import generic_handler
from gradwire_server.storages import Storages
from gradwire_server.tenants import Tenants
from gradwire_server.workers import Clusters


def keys(config: ServerConfig) -> tuple[grpc.ServerCredentials | None, TokenBook | None]:
    """(The port's certificates, None for plain text; the tokens that let in, None for everybody.)

    Raises FailedPrecondition TOKENS_UNREADABLE and CERTIFICATE_INVALID, which name the setting and the file.
    """
    credentials = None
    if config.tls_certificate is not None and config.tls_key is not None:
        files = Certificates(certificate=config.tls_certificate, key=config.tls_key, client_ca=config.tls_client_ca)
        credentials = files.credentials()
    return credentials, None if config.tokens is None else TokenBook(config.tokens)


class Service:
    """Everything between the socket and the ranks. `folder` is private, in shared memory, and the service's alone.

    sockets: a private folder for the socket over which clients share memory; None: they do not. health: what its port
    answers, too; None: it is ready as long as it does not drain. Raises what `keys` does.
    """

    def __init__(
        self,
        clusters: Clusters,
        folder: Path,
        config: ServerConfig,
        storages: Storages,
        sockets: Path | None = None,
        health: Health | None = None,
    ) -> None:
        self._listen = config.listen
        self._health = Health(Readiness()) if health is None else health
        self._credentials, book = keys(config)
        self._tenants = Tenants(clusters, folder, config, storages)
        self._door = door = Door(self._tenants.of, book)
        self._local: LocalSocket | None = None
        limits = config.limits
        if sockets is not None and config.shares_memory:
            self._local = LocalSocket(sockets / f"{SOCKET_PREFIX}{secrets.token_hex(8)}.sock", door, limits)
        handler = generic_handler(door, limits.message_bytes, config.stall_seconds)
        age = age_options(config.connection_age_seconds, config.connection_age_grace_seconds)
        self._server = GrpcServer(handler, limits.message_bytes, self._health, age)

    async def start(self) -> int:
        """Serve; returns the port. Models of the storage come back meanwhile. Raises Unavailable ADDRESS_IN_USE."""
        self._tenants.open()
        if self._local is not None:
            self._local.start()
            self._tenants.local_socket = self._local.path
        return await self._server.start(self._listen, self._credentials)

    async def drain(self) -> None:
        """Take no new requests, and return when all that came before have ended."""
        self._health.readiness.set(DRAIN, "the service is stopping")
        await self._health.publish()
        self._tenants.drain()
        await self._tenants.idle()

    async def save_changed(self) -> None:
        """Take a checkpoint of every model that has changed since its newest one. What fails is logged."""
        await self._tenants.save_changed()

    async def close(self) -> None:
        """End everything: cut requests, free ranks, remove files. What is in the storage stays."""
        await self._server.stop(0)
        if self._local is not None:
            self._local.close()
        await self._tenants.close()
