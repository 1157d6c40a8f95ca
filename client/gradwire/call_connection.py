"""One connection to a service on this machine over which calls are made, one at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from dataclasses import dataclass

from gradwire_proto.local_wire import CALL_BYTES, PACKET_BYTES, close_files, receive_packet, send_packet
from gradwire_proto.v1 import local_pb2

_IN_PACKET_BYTES = PACKET_BYTES - 256
"""Bytes of a request at most that travels in a packet: what is around it must fit into it, too."""

_SENT_AT_ONCE = 0.001
"""Seconds that sending may take for the rest of a call to have the whole timeout: setting another takes its time."""


@dataclass(frozen=True, slots=True)
class CallReply:
    """What came, `response` in one piece, and the files of the tensors that came along: the taker's to close."""

    message: local_pb2.LocalReply
    response: bytes
    files: list[int]


class CallConnection:
    """See the module. Its requests' file is kept from one call to the next: fresh memory costs more than the copy."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = -1
        self._size = 0

    def ask(self, method: str, request: bytes, timeout: float) -> CallReply | None:
        """The reply, in `timeout` seconds; None where the request did not leave. OSError, EOFError."""
        end = time.monotonic() + timeout
        self._socket.settimeout(timeout)
        packet = local_pb2.LocalRequest()
        call = packet.call
        call.method, call.timeout_seconds = method, timeout
        files: tuple[int, ...] = ()
        try:
            if len(request) <= _IN_PACKET_BYTES:
                call.request = request
            else:
                call.request_bytes, files = len(request), (self._written(request),)
            send_packet(self._socket, packet, files)
        except OSError:
            return None
        left = end - time.monotonic()
        if timeout - left > _SENT_AT_ONCE:
            self._socket.settimeout(max(left, 0.001))
        message, found = receive_packet(self._socket, local_pb2.LocalReply)
        try:
            response = message.response
            if message.response_bytes:
                response = _read(found.pop() if found else -1, message.response_bytes)
        except BaseException:
            close_files(found)
            raise
        return CallReply(message, response, found)

    def hang_up(self) -> None:
        """Whoever waits for an answer wakes, and closes it. Any thread may call it."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let it go."""
        self._socket.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _written(self, request: bytes) -> int:
        """The file, with the request at its beginning."""
        if self._file < 0:
            self._file = os.memfd_create("gradwire-request", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # The service reads from no file that could shrink meanwhile.
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        rest, position = memoryview(request), 0
        while rest:
            written = os.pwrite(self._file, rest, position)
            rest, position = rest[written:], position + written
        return self._file


def _read(file: int, nbytes: int) -> bytes:
    """The bytes of a response's file, which is closed."""
    try:
        if not 0 < nbytes <= 2 * CALL_BYTES:
            raise OSError(f"a response of {nbytes} bytes")
        response = os.pread(file, nbytes, 0)
        if len(response) < nbytes:
            raise EOFError("a response is not whole")
        return response
    finally:
        if file >= 0:
            os.close(file)
