"""Where a rank's commands come from, and its answers go to: a ZeroMQ pair, and for small ones the socket beside it."""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

import zmq

from gradwire_workers import direct_socket
from gradwire_workers.frames import Frame

_POLLIN = int(zmq.POLLIN)


class CommandSockets:
    """Those of a rank at `endpoint`, for one frontend. They belong to one thread."""

    def __init__(self, endpoint: str) -> None:
        self._pair = zmq.Context.instance().socket(zmq.PAIR)
        self._pair.setsockopt(zmq.LINGER, 0)
        self._pair.setsockopt(zmq.SNDHWM, 0)
        self._pair.setsockopt(zmq.RCVHWM, 0)
        self.monitor = self._pair.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        """Tells when the frontend comes, and when it is gone."""
        path = direct_socket.direct_path(endpoint)
        self._listener = None if path is None else direct_socket.listen(path)
        # Behind the listener: whoever finds the one finds the other.
        self._pair.bind(endpoint)
        self._direct: socket.socket | None = None
        self._is_direct = False
        """Whether the last command came directly."""
        self._sleep = select.poll()
        self._sleep.register(self._pair.getsockopt(zmq.FD), select.POLLIN)  # pyright: ignore[reportArgumentType]
        if self._listener is not None:
            self._sleep.register(self._listener, select.POLLIN)

    def receive(self) -> list[Frame]:
        """The next command, however long it takes to come. What came directly was sent first: see RankChannel."""
        while True:
            # Each time: ZeroMQ's descriptor signals changes only, and sending may swallow them.
            has_come = bool(self._pair.getsockopt(zmq.EVENTS) & _POLLIN)  # type: ignore[operator]
            ready = [descriptor for descriptor, _ in self._sleep.poll(0 if has_come else None)]
            if self._listener is not None and self._listener.fileno() in ready:
                self._accept(self._listener)
            elif self._direct is not None and self._direct.fileno() in ready:
                frames = direct_socket.receive(self._direct)
                if frames is not None:
                    self._is_direct = True
                    return frames
                # The frontend is gone, as the monitor will tell, too.
                self._sleep.unregister(self._direct)
                self._direct.close()
                self._direct = None
            elif has_come:
                self._is_direct = False
                return [frame.buffer for frame in self._pair.recv_multipart(copy=False)]

    def send(self, frames: Sequence[Frame]) -> None:
        """Send what answers the last command, or a part of it: the way it came, if that can be."""
        if self._is_direct and self._direct is not None and direct_socket.send(self._direct, frames):
            return
        self._pair.send_multipart(frames)

    def _accept(self, listener: socket.socket) -> None:
        self._direct, _ = listener.accept()
        self._sleep.unregister(listener)
        self._sleep.register(self._direct, select.POLLIN)
        listener.close()
        self._listener = None
