"""A TCP proxy between clients and a service, whose connections are cut: at once, or in the midst of what passes."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

_PIECE = 1 << 16

_REQUEST = 128
"""Bytes that a request has more than: shorter pieces are the protocol's own, such as acknowledgements and pings."""

_ARRIVES = 0.05
"""Seconds after which the service has certainly got what was passed on."""


class CuttingProxy:
    """Listens on a free loopback port, its `target`, and passes connections on to `service`, "host:port".

    up_left, down_left: so many more bytes pass in that direction, to the service or from it, before everything is cut;
    None: as many as come. cuts: how often there was something to cut.
    """

    def __init__(self, service: str) -> None:
        host, _, port = service.rpartition(":")
        self.up_left: int | None = None
        self.down_left: int | None = None
        self.cuts = 0
        self._to = (host, int(port))
        self._cuts_after_request = False
        self._open: set[_Pair] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, both ways."""
        with self._lock:
            pairs, self._open = self._open, set()
        self.cuts += bool(pairs)
        for pair in pairs:
            pair.close(reset=True)

    def cut_after_request(self) -> None:
        """Let the next request reach the service, and reset that connection before anything comes back."""
        self._cuts_after_request = True

    def close(self) -> None:
        """Reset every connection, and take no more."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._to)
                except OSError:
                    near.close()
                    continue
                pair = _Pair(near, far)
                with self._lock:
                    self._open.add(pair)
                for pump in (self._pass_requests, self._pass_replies):
                    threading.Thread(target=self._run, args=(pump, pair), name="proxy", daemon=True).start()

    def _run(self, pump: Callable[[_Pair], None], pair: _Pair) -> None:
        with suppress(OSError):
            pump(pair)
        with self._lock:
            self._open.discard(pair)
        pair.close(reset=pair.is_mute)

    def _pass_requests(self, pair: _Pair) -> None:
        while piece := pair.near.recv(_PIECE):
            if self._cuts_after_request and len(piece) > _REQUEST:
                self._cuts_after_request, pair.is_mute = False, True
                pair.far.sendall(piece)
                time.sleep(_ARRIVES)
                return
            self._pass(piece, pair.far, "up_left")

    def _pass_replies(self, pair: _Pair) -> None:
        while piece := pair.far.recv(_PIECE):
            if not pair.is_mute:
                self._pass(piece, pair.near, "down_left")

    def _pass(self, piece: bytes, sink: socket.socket, bound: str) -> None:
        left = getattr(self, bound)
        if left is not None and left < len(piece):
            setattr(self, bound, None)
            sink.sendall(piece[:left])
            self.cut()
            return
        if left is not None:
            setattr(self, bound, left - len(piece))
        sink.sendall(piece)


@dataclass(eq=False)
class _Pair:
    """A client's connection and the one to the service. is_mute: nothing goes back to the client any more."""

    near: socket.socket
    far: socket.socket
    is_mute: bool = False

    def close(self, *, reset: bool) -> None:
        """End both. reset: at once, without what is still on its way."""
        for each in (self.near, self.far):
            with suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Whoever waits for it wakes.
                each.shutdown(socket.SHUT_RDWR)
            each.close()
