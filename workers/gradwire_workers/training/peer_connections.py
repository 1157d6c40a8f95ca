"""The TCP connections that gloo made to the other ranks: watched, and closed when the group has failed.

gloo cannot be told to give up: it closes its connections when the last reference to a group goes, and a process that
waits for a peer waits until its timeout. A connection that is shut down at the socket is noticed by both ends.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from torch._C._distributed_c10d import Store

Address = tuple[str, int]


class PeerConnections:
    """The connections between this process and the processes of the other ranks.

    `on_closed` is called once, from a thread, when a peer closes one, from `watch` on. Made by all ranks together,
    through `store`.
    """

    def __init__(self, store: Store, *, rank: int, size: int, on_closed: Callable[[object], None]) -> None:
        self._on_closed = on_closed
        mine = _open_connections()
        store.set(f"connections/{rank}", json.dumps(list(mine)))
        theirs = set()
        for peer in range(size):
            if peer != rank:
                theirs |= {
                    (tuple(remote), tuple(local)) for local, remote in json.loads(store.get(f"connections/{peer}"))
                }
        # The process has other connections too: those that a peer also holds, seen from the other end, are gloo's.
        self._sockets = [mine.pop(ends) for ends in list(mine) if ends in theirs]
        for stranger in mine.values():
            stranger.close()
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()

    def watch(self) -> None:
        """Begin to look out for peers that close one; those that have done so already count."""
        threading.Thread(target=self._watch, daemon=True, name="gradwire-peers").start()

    def close(self) -> None:
        """Shut all of them down, for gloo in this process and for the peers, at once. Repeating it does nothing."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
            if not sockets:
                return
            for connection in sockets:
                with suppress(OSError):  # the peer was first
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            os.close(self._wake_writer)

    def _watch(self) -> None:
        """Sleep until a peer closes a connection, or `close` does."""
        poll = select.poll()
        with self._lock:
            for connection in self._sockets:
                poll.register(connection, select.POLLRDHUP)
        poll.register(self._wake_reader, 0)
        ready = [descriptor for descriptor, _ in poll.poll()]
        os.close(self._wake_reader)
        if self._wake_reader not in ready:
            self._on_closed("it closed its connection")


def _open_connections() -> dict[tuple[Address, Address], socket.socket]:
    """The TCP connections of this process, by their two ends, as duplicates that the caller closes."""
    connections = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptor = os.dup(int(name))
        except OSError:
            continue  # closed since it was listed
        try:
            candidate = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)
            continue  # not a socket
        try:
            if candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.type == socket.SOCK_STREAM:
                connections[candidate.getsockname()[:2], candidate.getpeername()[:2]] = candidate
                continue
        except OSError:
            pass  # listening, or closed meanwhile
        candidate.close()
    return connections
