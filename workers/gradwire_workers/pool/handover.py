"""What a process hands over to the template, so that a fork of the template can go on in its place.

Imports nothing but the standard library's smallest: it is on the way of every rank that starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

TEMPLATE_VARIABLE = "GRADWIRE_TEMPLATE"
"""Names the Unix socket of this node's template, in a folder that only its user may enter."""

_LENGTH_BYTES = 4
_OOM_SCORE_FILE = "/proc/self/oom_score_adj"
_STREAMS = (0, 1, 2)


class Handover:
    """A Python program to be run as if this process had started it: the same streams, environment and folder.

    `state`: program and arguments, environment, working folder, and the kernel's score for who is killed first when
    memory runs out, which Ray sets for its workers.
    """

    def __init__(self, state: dict, streams: list[int]) -> None:
        self._state = state
        self._streams = streams

    @classmethod
    def of_this_process(cls, program: str, arguments: list[str]) -> Handover:
        """What this process is, about to run `program`."""
        with open(_OOM_SCORE_FILE) as file:
            score = file.read()
        state = {
            "arguments": [program, *arguments],
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "oom_score": score,
        }
        return cls(state, list(_STREAMS))

    def send(self, connection: socket.socket) -> bool:
        """Whether whoever is at the other end has taken it over."""
        data = json.dumps(self._state).encode()
        socket.send_fds(connection, [len(data).to_bytes(_LENGTH_BYTES, "little")], self._streams)
        connection.sendall(data)
        return connection.recv(1) == b"+"

    @classmethod
    def receive(cls, connection: socket.socket) -> Handover:
        """The other end of `send`. OSError or ValueError when it is not whole."""
        head, streams, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, len(_STREAMS))
        handover = cls({}, list(streams))
        try:
            length = int.from_bytes(head, "little")
            data = bytearray()
            while len(data) < length and (part := connection.recv(min(65536, length - len(data)))):
                data += part
            if len(head) < _LENGTH_BYTES or len(data) < length or len(streams) < len(_STREAMS):
                raise ConnectionError("a handover ended early")
            handover._state = json.loads(data)
        except BaseException:
            handover.close()
            raise
        return handover

    def acknowledge(self, connection: socket.socket) -> None:
        """Let `send` return True."""
        connection.sendall(b"+")

    def close(self) -> None:
        """Close the streams that came with it."""
        for stream in self._streams:
            os.close(stream)

    def become(self) -> str:
        """Make this process, a fork, what the sender was. Returns the program to run as `__main__`."""
        # Ray kills the process group of a worker that is gone: each must be alone in its own.
        os.setpgid(0, 0)
        for stream, received in zip(_STREAMS, self._streams, strict=True):
            os.dup2(received, stream)
        self.close()
        os.environ.clear()
        os.environ.update(self._state["environment"])
        os.chdir(self._state["folder"])
        # Lowering it takes a privilege; Ray only raises it.
        with contextlib.suppress(PermissionError), open(_OOM_SCORE_FILE, "w") as file:
            file.write(self._state["oom_score"])
        sys.argv = list(self._state["arguments"])
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        return sys.argv[0]
