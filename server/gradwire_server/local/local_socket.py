"""The Unix socket over which clients of this machine share memory with the service and make calls: local.proto.

Whoever connects must run as the same user as the service.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import socket
from pathlib import Path

from gradwire_proto.local_wire import MOST_PATH_BYTES, new_socket, peer_user, service_of
from gradwire_proto.values import Limits
from gradwire_server.doors.door import Door
from gradwire_server.local.local_connection import Held, LocalConnection, LocalPlace

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 256
"""Connections at once, of which a client has several. Whoever gets none uses gRPC alone."""

SOCKET_PREFIX = "clients-"
"""What the names of such sockets begin with."""

_PAUSE_SECONDS = 1.0
"""How long nobody is let in where the process has too many open files: those who come would wake it all the time."""

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""What `accept` says then, and goes on saying."""

# Of Linux's prctl.h.
_PR_GET_DUMPABLE = 3


class LocalSocket:
    """Listens at `path`, in a private folder, once it was started. All methods belong to the event loop's thread."""

    def __init__(self, path: Path, door: Door[LocalPlace], limits: Limits) -> None:
        self._path = path
        self._door = door
        self._limits = limits
        self._listener: socket.socket | None = None
        self._connections: set[LocalConnection] = set()
        self._held = Held()

    @property
    def path(self) -> str:
        """Where clients find it; "" where it does not listen."""
        return "" if self._listener is None else str(self._path)

    def start(self) -> None:
        """Listen, where the system lets it: otherwise there is no such socket."""
        self._sweep()
        if len(os.fsencode(self._path)) > MOST_PATH_BYTES:
            logger.warning("no shared memory with clients: the path %s is too long for a socket", self._path)
            return
        listener = new_socket()
        try:
            if not _is_open_to_ranks():
                raise PermissionError("the system hides this process's files from others of its user")
            listener.bind(str(self._path))
            os.chmod(self._path, 0o600)
            listener.listen(MOST_CONNECTIONS)
            listener.setblocking(False)
        except OSError as error:
            logger.warning("no shared memory with clients: %s", error)
            listener.close()
            return
        self._listener = listener
        self._listen()

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        """End every connection, and remove the socket. Uploads that came by it stay."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener)
                loop.call_later(_PAUSE_SECONDS, self._listen)
            return  # Otherwise it has left again.
        if len(self._connections) >= MOST_CONNECTIONS or peer_user(peer) != os.geteuid():
            peer.close()
            return
        peer.setblocking(False)
        service = service_of(self.path)
        self._connections.add(LocalConnection(peer, self._door, self._limits, service, self._held, self._ended))

    def _ended(self, connection: LocalConnection) -> None:
        self._connections.discard(connection)

    def _sweep(self) -> None:
        """Remove the sockets of services that were killed: nobody listens at them any more."""
        for path in self._path.parent.glob(f"{SOCKET_PREFIX}*.sock"):
            with new_socket() as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink(missing_ok=True)
                except OSError:
                    pass


def _is_open_to_ranks() -> bool:
    """Whether other processes of this user may open this one's files below /proc."""
    return ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1
