"""A Unix socket beside a rank's ZeroMQ pair, for small messages: they come without ZeroMQ's own threads, which have to
wake up for each in both processes, and take longer than a small step does.

Whether the other end lives is ZeroMQ's to say. What keeps the order of messages that go by both: see RankChannel.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from gradwire_workers.frames import Frame

PACKET_BYTES = 32 << 10
"""Bytes of a message at most, with what is around its frames."""

_ALIGNMENT = 16
"""Frames begin at multiples of so many bytes."""

_PADDING = bytes(_ALIGNMENT)
_SCHEME = "ipc://"
_KIND = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
_MOST_FRAMES = 64
_SIZES = [struct.Struct(f"<{count + 1}I") for count in range(_MOST_FRAMES + 1)]
"""Of a packet with so many frames: the count, and the bytes of each."""


def direct_path(endpoint: str) -> str | None:
    """Where the socket of a rank is found that is at `endpoint`; None where that is not on this machine."""
    return os.path.splitext(endpoint.removeprefix(_SCHEME))[0] + ".seq" if endpoint.startswith(_SCHEME) else None


def listen(path: str) -> socket.socket:
    """The rank's end, which one frontend comes to."""
    listener = socket.socket(socket.AF_UNIX, _KIND)
    listener.bind(path)
    listener.listen(1)
    return listener


def connect(path: str) -> socket.socket | None:
    """The frontend's end, which waits for nothing; None where no rank listens."""
    connection = socket.socket(socket.AF_UNIX, _KIND | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    # Nobody else needs to find it.
    with suppress(OSError):
        os.unlink(path)
    return connection


def send(connection: socket.socket, frames: Sequence[Frame]) -> bool:
    """Send a message. False: it is too large. OSError where it cannot be sent, or not now."""
    sizes = [len(frame) for frame in frames]
    if len(sizes) > _MOST_FRAMES or sum(sizes) + _ALIGNMENT * len(sizes) + _SIZES[-1].size > PACKET_BYTES:
        return False
    packed = _SIZES[len(sizes)]
    head = packed.pack(len(sizes), *sizes)
    parts: list[Frame] = [head]
    position = packed.size
    for frame, size in zip(frames, sizes, strict=True):
        if rest := -position % _ALIGNMENT:
            parts.append(_PADDING[:rest])
            position += rest
        parts.append(frame)
        position += size
    # In one piece: what many pieces cost the kernel is more than the copy.
    connection.send(b"".join(parts), socket.MSG_NOSIGNAL)
    return True


def receive(connection: socket.socket) -> list[Frame] | None:
    """The frames of the next message; None where the other end has left. OSError where nothing can be received."""
    packet = connection.recv(PACKET_BYTES)
    if not packet:
        return None
    view = memoryview(packet)
    count = view[:4].cast("I")[0]
    packed = _SIZES[count]
    position, frames = packed.size, []
    for size in packed.unpack_from(packet)[1:]:
        position += -position % _ALIGNMENT
        frames.append(view[position : position + size])
        position += size
    return frames
