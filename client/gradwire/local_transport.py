"""Memory shared with a service on this machine: found by itself, used for tensors that are big enough, else gRPC is.

Nothing here raises: what cannot be done answers False or None, and the caller does it by gRPC at once.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from gradwire.deadline import Deadline
from gradwire.memory_files import MappedFile, sealed_file
from gradwire_proto.encoding.enum_words import DTYPES
from gradwire_proto.errors import GradwireError
from gradwire_proto.local_wire import close_files, new_socket, peer_user, receive_packet, send_packet, service_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2
from gradwire_proto.values import TensorData

SHARED_BYTES = 256 << 10
"""A request's tensors that have more bytes than this together are cheaper in shared memory than in their message."""

FETCHED_BYTES = 1 << 20
"""A reply's are so from here on: it takes another question to the service to get them."""

_UNANSWERED_BYTES = 4 << 20
"""Of an upload of more bytes the answer is waited for: bringing it again by gRPC would take long."""

_MOST_UNREAD = 8

_MOST_BROUGHT = 16
"""Downloads that came by themselves, and are not asked for yet."""

_PATIENCE = 5.0
"""Seconds until a service that does not answer is asked by gRPC instead, at most. Never more than half of those that
the call has: gRPC has the others.
"""

_LOOK_SECONDS = 1.0
"""How long the service may take to say where its memory is shared; until then, or without, calls go on by gRPC."""

_PAUSE = 1.0
"""Seconds after a failure until the service is looked for again."""


class LocalTransport:
    """The connection to one service. Threads may share it.

    find: asks the service, for so many seconds at most, for the path of its socket, "" where it has none; raises
    GradwireError. enabled: whether memory may be shared at all. timeout: seconds that a call may take, or a download
    stand still. token: what proves who calls.
    """

    def __init__(
        self, find: Callable[[float], str], *, enabled: bool = True, timeout: float = 60.0, token: str | None = None
    ) -> None:
        self._token = token
        self._patience = min(timeout / 2, _PATIENCE)
        self._find = find
        self._enabled = enabled
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._path = ""
        self._socket: socket.socket | None = None
        self._unread = 0
        """Requests whose answers were not read yet."""
        self._is_offered = False
        self._again_at = 0.0
        self._brought: dict[str, tuple[Sequence[Any], list[int]]] = {}

    @property
    def is_connected(self) -> bool:
        """Whether memory is shared. Never in a forked child: the connection is its parent's."""
        if os.getpid() != self._process:
            return False
        return self._socket is not None

    def look_again(self, deadline: Deadline) -> None:
        """Connect anew where memory was shared, and some time has passed since that broke.

        To be called when the service has just answered: it is there, and this takes no time that a call waits for.
        """
        if self._socket is not None or not self._is_offered or time.monotonic() < self._again_at:
            return
        seconds = min(_LOOK_SECONDS, deadline.left / 2)
        if seconds > 0:
            self._again_at = time.monotonic() + _PAUSE
            with suppress(GradwireError):
                self.offer(self._find(seconds), seconds)

    def offer(self, path: str, patience: float | None = None) -> None:
        """Connect to the socket at `path` where it is on this machine, this user's, and of the service that says so."""
        if not self._enabled or not path:
            return
        connection = _connect(path, self._patience if patience is None else patience, self._token)
        if connection is None:
            return
        with self._lock:
            if self._enabled:
                self._is_offered = True
                self._path, self._socket, connection, self._unread = path, connection, self._socket, 0
        if connection is not None:
            connection.close()

    def connect_once_more(self) -> socket.socket | None:
        """Another connection to the service that memory is shared with, the caller's own; None where there is none."""
        return _connect(self._path, _LOOK_SECONDS, self._token) if self.is_connected else None

    def upload(self, upload_id: str, tensors: Sequence[TensorData], deadline: Deadline) -> bool:
        """Bring tensors to the service under that id. False: they are not there; half of the time is left at least.

        True of few bytes says only that they are on their way: the service may refuse them yet, and then it refuses the
        request that names them. To wait for its answer would cost more than to bring them.
        """
        if not self.is_connected:
            return False
        try:
            file = sealed_file(tensors)
        except OSError:
            return False
        request = local_pb2.LocalRequest(upload=local_pb2.LocalUpload(manifest=upload_manifest(upload_id, tensors)))
        try:
            # Writing the file is the client's own work; the clock runs while the service is asked.
            with deadline.running():
                patience = min(self._patience, deadline.left / 2)
                if sum(tensor.nbytes for tensor in tensors) <= _UNANSWERED_BYTES:
                    return self._tell(request, [file], patience)
                reply, files = self._ask(request, [file], patience)
        finally:
            os.close(file)
        close_files(files)
        return reply is not None and reply.WhichOneof("kind") == "uploaded"

    def download(self, name: str, tensors: Sequence[TensorData]) -> list[torch.Tensor] | None:
        """The tensors "downloads/{download}", of which `tensors` says the types. None: they are still to be fetched.

        It stands still for half of the timeout at most.
        """
        if (brought := self._brought.pop(name, None)) is not None:
            places, files = brought
            try:
                return _mapped(tensors, places, files)
            finally:
                close_files(files)
        if not self.is_connected:
            return None
        request = local_pb2.LocalRequest(download=local_pb2.LocalDownload(name=name))
        reply, files = self._ask(request, [], self._patience)
        try:
            if reply is None or reply.WhichOneof("kind") != "downloaded":
                return None
            return _mapped(tensors, reply.downloaded.places, files)
        finally:
            close_files(files)

    def brought(self, brought: local_pb2.LocalBrought, files: list[int]) -> None:
        """Tensors of a download came with the response that names it: `download` is going to ask for them."""
        self._brought[brought.name] = (brought.places, files)
        while len(self._brought) > _MOST_BROUGHT:  # Whoever should have asked was interrupted.
            with suppress(KeyError, RuntimeError):
                close_files(self._brought.pop(next(iter(self._brought)))[1])

    def close(self) -> None:
        """Hang up, for good."""
        with self._lock:
            self._enabled = self._is_offered = False
            self._drop()
        while self._brought:
            close_files(self._brought.popitem()[1][1])

    def _ask(self, request: Any, files: list[int], patience: float) -> tuple[local_pb2.LocalReply | None, list[int]]:
        """The reply and the files that came with it, in `patience` seconds. None: there is no use in the connection."""
        with self._connection(patience) as ready:
            if ready is not None:
                send_packet(ready(), request, files)
                self._read_answers(ready)
                return receive_packet(ready(), local_pb2.LocalReply)
        return None, []

    def _tell(self, request: Any, files: list[int], patience: float) -> bool:
        """Send a request whose answer is not waited for. False: it cannot be sent in `patience` seconds."""
        with self._connection(patience) as ready:
            if ready is not None:
                if self._unread >= _MOST_UNREAD:
                    self._read_answers(ready)
                send_packet(ready(), request, files)
                self._unread += 1
                return True
        return False

    def _read_answers(self, ready: Callable[[], socket.socket]) -> None:
        """Read those that were not waited for."""
        while self._unread:
            close_files(receive_packet(ready(), local_pb2.LocalReply)[1])
            self._unread -= 1

    @contextmanager
    def _connection(self, patience: float) -> Iterator[Callable[[], socket.socket] | None]:
        """Inside, the connection is the caller's: asked for it, this gives it with the rest of `patience` seconds as
        its timeout. None where there is none, or others use it for as long.

        Whatever goes wrong inside, the next answer would be taken for that of another request: it is dropped.
        """
        end = time.monotonic() + patience

        def ready() -> socket.socket:
            assert self._socket is not None
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            return self._socket

        if not self._lock.acquire(timeout=max(patience, 0.0)):
            yield None
            return
        try:
            yield ready if self._socket is not None else None
        except (OSError, EOFError):
            self._drop()
        except BaseException:  # Ctrl-C, say.
            self._drop()
            raise
        finally:
            self._lock.release()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._unread = 0
            self._again_at = time.monotonic() + _PAUSE


def upload_manifest(upload_id: str, tensors: Sequence[TensorData]) -> pb.UploadManifest:
    """What an upload of these tensors begins with."""
    manifest = pb.UploadManifest(upload_id=upload_id)
    for tensor in tensors:
        manifest.tensors.add(dtype=DTYPES.number(tensor.dtype, "dtype"), shape=tensor.shape)
    return manifest


def _connect(path: str, patience: float, token: str | None) -> socket.socket | None:
    try:
        found = os.stat(path)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            return None
    except OSError:
        return None
    connection = new_socket()
    try:
        connection.settimeout(patience)
        connection.connect(path)
        if peer_user(connection) == os.geteuid():
            send_packet(connection, local_pb2.LocalRequest(hello=local_pb2.LocalHello(token=token or "")))
            reply, files = receive_packet(connection, local_pb2.LocalReply)
            close_files(files)
            if reply.welcome.service == service_of(path):
                return connection
    except (OSError, EOFError):
        pass
    connection.close()
    return None


def _mapped(tensors: Sequence[TensorData], places: Sequence[Any], files: Sequence[int]) -> list[torch.Tensor] | None:
    """The tensors where they lie; None where what came is not what was asked for."""
    if [tensor.nbytes for tensor in tensors] != [place.nbytes for place in places]:
        return None
    ends = [0] * len(files)
    for place in places:
        if not (place.file < len(files) and place.offset >= 0):
            return None
        ends[place.file] = max(ends[place.file], place.offset + place.nbytes)
    try:
        if any(os.fstat(file).st_size < end for file, end in zip(files, ends, strict=True)):
            return None
        mapped = [MappedFile(file, end) for file, end in zip(files, ends, strict=True)]
    except (OSError, RuntimeError):  # torch's way of saying that it could not be opened or mapped.
        return None
    return [mapped[place.file].tensor(kind, place.offset) for kind, place in zip(tensors, places, strict=True)]
