"""A proxy that cuts connections: at once, or when so many more bytes of one direction have passed."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress


class Proxy:
    """Passes connections on to `port`, and cuts them: at once, or after so many bytes of one direction."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.up_left: int | None = None
        self.down_left: int | None = None
        self.cuts = 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, both ways."""
        self.cuts += bool(self._open)
        for each in self._open:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    near.close()
                    continue
                self._open += [near, far]
                threading.Thread(target=self._pump, args=(near, far, "up_left"), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, "down_left"), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, bound: str) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                left = getattr(self, bound)
                if left is not None and left < len(piece):
                    setattr(self, bound, None)
                    sink.sendall(piece[:left])
                    self.cut()
                    return
                if left is not None:
                    setattr(self, bound, left - len(piece))
                sink.sendall(piece)
        source.close()
        sink.close()
