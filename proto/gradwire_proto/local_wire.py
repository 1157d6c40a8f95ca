"""How client and service share memory on one machine: packets of a Unix socket, and files of memory beside them.

The messages are those of v1/local.proto. An upload's file is a memfd under all of SEALS: nobody can change or shrink it
any more, its sender neither; so is that of a response. That of a request is only read, once, into memory of the
receiver's own. A download's files are the receiver's to read, and to map copy on write.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from collections.abc import Iterable, Sequence
from fcntl import F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from typing import TypeVar

from google.protobuf.message import Message

SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
"""What must be forbidden of a file before it is sent as an upload."""

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes, so that torch can use them where they lie."""

PACKET_BYTES = 64 << 10
"""Bytes of a packet at most. What does not fit travels by gRPC."""

CALL_BYTES = 8 << 20
"""Bytes of a call's request or response at most, which is in a file where it does not fit into a packet."""

MOST_FILES = 16
"""Files that come with a packet at most."""

MOST_PATH_BYTES = 107
"""Bytes of a socket's path at most: the kernel's bound."""

_FILES = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
_FILES_ROOM = socket.CMSG_LEN(MOST_FILES * array("i").itemsize)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
"""A plain number: combining the enums anew takes longer than the call."""

M = TypeVar("M", bound=Message)


class PacketError(OSError):
    """A packet that cannot be sent, or is none of ours."""


def new_socket() -> socket.socket:
    """A socket of the kind that both sides use: a packet comes whole or not at all."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def service_of(path: str) -> str:
    """What the service that made the socket at `path` calls itself in its welcome."""
    return os.path.basename(path).removesuffix(".sock")


def aligned(sizes: Iterable[int]) -> tuple[list[int], int]:
    """(where tensors of these sizes begin in their file, the size of the file)."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def send_packet(to: socket.socket, message: Message, files: Sequence[int] = ()) -> None:
    """Send a message with copies of some descriptors. PacketError where it is too big, BlockingIOError and the like."""
    packet = message.SerializeToString()
    if len(packet) > PACKET_BYTES or len(files) > MOST_FILES:
        raise PacketError(f"{len(packet)} bytes and {len(files)} files do not fit into a packet")
    # A peer that is gone is an error of this call, not a signal to the process.
    if files:
        socket.send_fds(to, [packet], list(files), socket.MSG_NOSIGNAL)
    else:
        to.send(packet, socket.MSG_NOSIGNAL)


def receive_packet(of: socket.socket, kind: type[M]) -> tuple[M, list[int]]:
    """(message, descriptors, which are the caller's to close). EOFError when the peer has left; PacketError."""
    # Not socket.recv_fds, which forgets the flags that it is given.
    packet, beside, flags, _ = of.recvmsg(PACKET_BYTES + 1, _FILES_ROOM, socket.MSG_CMSG_CLOEXEC)
    files = [file for level, sort, data in beside if (level, sort) == _FILES for file in _descriptors(data)]
    try:
        if not packet:
            raise EOFError("the peer has left")
        if len(packet) > PACKET_BYTES or flags & _CUT:
            raise PacketError("a packet is too big")
        return kind.FromString(packet), files
    except BaseException as error:
        close_files(files)
        if isinstance(error, (EOFError, OSError)):
            raise
        raise PacketError(f"a packet is no {kind.DESCRIPTOR.full_name}") from None


def _descriptors(data: bytes) -> list[int]:
    found = array("i")
    found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def close_files(files: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in files:
        os.close(descriptor)


def has_seals(descriptor: int, seals: int) -> bool:
    """Whether it is a memfd with at least these seals. One that is not may be anything: a read may wait for ever."""
    try:
        return fcntl(descriptor, F_GET_SEALS) & seals == seals
    except OSError:
        return False


def peer_user(of: socket.socket) -> int:
    """The user who runs the process at the other end, as the kernel saw it connect or listen."""
    credentials = of.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
