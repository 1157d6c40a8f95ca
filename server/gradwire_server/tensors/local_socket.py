"""The Unix socket over which clients of this machine share memory with the service: local.proto, from this side.

Whoever connects must run as the same user as the service. Nothing that a client sends is waited for, and nothing that
it does to its own files afterwards reaches anybody else: uploads are sealed, and downloads are the client's alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradwire_proto.codec import refuse_unknown_fields
from gradwire_proto.errors import GradwireError, InvalidArgument, ResourceExhausted
from gradwire_proto.local_wire import (
    MOST_PATH_BYTES,
    PacketError,
    close_files,
    new_socket,
    peer_user,
    receive_packet,
    send_packet,
    service_of,
)
from gradwire_proto.v1 import local_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.tensors.file_threads import THREAD_BYTES, in_thread
from gradwire_server.tensors.held_files import TensorType
from gradwire_server.tensors.sealed_files import SealedFile
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.tensors.tensor_streams import decode_manifest

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 64
"""Clients that are connected at once. Further ones use gRPC alone."""

MOST_UPLOADS = 32
"""Uploads of one connection that are held at once, each with an open file."""

# Of Linux's prctl.h.
_PR_GET_DUMPABLE = 3


class LocalSocket:
    """Listens at `path`, in a private folder, once it was started. All methods belong to the event loop's thread."""

    def __init__(self, path: Path, tensors: TensorStore, limits: Limits) -> None:
        self._path = path
        self._tensors = tensors
        self._limits = limits
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()

    @property
    def path(self) -> str:
        """Where clients find it; "" where it does not listen."""
        return "" if self._listener is None else str(self._path)

    def start(self) -> None:
        """Listen, where the system lets it: otherwise there is no such socket."""
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
        asyncio.get_running_loop().add_reader(listener, self._accept)

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
        except OSError:  # It has left again, or there are too many open files.
            return
        if len(self._connections) >= MOST_CONNECTIONS or peer_user(peer) != os.geteuid():
            peer.close()
            return
        peer.setblocking(False)
        self._connections.add(_Connection(peer, self._tensors, self._limits, service_of(self.path), self._ended))

    def _ended(self, connection: _Connection) -> None:
        self._connections.discard(connection)


@dataclass(frozen=True, slots=True)
class _Upload:
    file: SealedFile
    types: Sequence[TensorType]
    name: str


class _Connection:
    """One client. Its requests are answered one after another."""

    def __init__(
        self,
        peer: socket.socket,
        tensors: TensorStore,
        limits: Limits,
        service: str,
        ended: Callable[[_Connection], None],
    ) -> None:
        self._peer = peer
        self._tensors = tensors
        self._limits = limits
        self._service = service
        self._ended = ended
        self._held = 0
        self._loop = asyncio.get_running_loop()
        self._checking: asyncio.Task[None] | None = None
        self._loop.add_reader(peer, self._read)

    def close(self) -> None:
        """Hang up."""
        if self._peer.fileno() >= 0:
            self._loop.remove_reader(self._peer)
            self._peer.close()
            self._ended(self)

    def _read(self) -> None:
        try:
            request, files = receive_packet(self._peer, pb.LocalRequest)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, EOFError):
            self.close()
            return
        try:
            with self._refusals():
                self._do(request, files)
        finally:
            close_files(files)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Inside, errors become answers."""
        try:
            yield
        except GradwireError as error:
            self._say(pb.LocalReply(refusal=pb.LocalRefusal(reason=error.reason, message=error.message)))
        except Exception:
            logger.exception("a request for shared memory failed")
            self.close()

    def _do(self, request: pb.LocalRequest, files: list[int]) -> None:
        refuse_unknown_fields(request)
        match request.WhichOneof("kind"):
            case "hello":
                self._say(pb.LocalReply(welcome=pb.LocalWelcome(service=self._service)))
            case "upload":
                self._upload(request.upload, files)
            case "download":
                self._download(request.download.name)
            case _:
                raise InvalidArgument("expected a request", field="kind", reason="FIELD_MISSING")

    def _upload(self, request: pb.LocalUpload, files: list[int]) -> None:
        """Takes the one file over, out of `files`."""
        types, name = decode_manifest(request.manifest, self._limits)
        if name is None or len(files) != 1:
            raise InvalidArgument("expected an upload_id and one file", field="manifest", reason="FIELD_MISSING")
        if self._held >= MOST_UPLOADS:
            raise ResourceExhausted(f"{self._held} uploads wait to be used", reason="TOO_MANY_UPLOADS", retryable=True)
        upload = _Upload(SealedFile(files.pop(), types), types, name)
        self._held += 1
        if upload.file.bool_bytes < THREAD_BYTES:
            with self._discarded_on_error(upload):
                upload.file.check_bools()
            self._adopt(upload)
        else:
            # The next request is read when this one is answered: nothing piles up here.
            self._loop.remove_reader(self._peer)
            self._checking = asyncio.ensure_future(self._check(upload))

    async def _check(self, upload: _Upload) -> None:
        with self._refusals():
            with self._discarded_on_error(upload):
                await in_thread(upload.file.check_bools)
            self._adopt(upload)
        if self._peer.fileno() >= 0:
            self._loop.add_reader(self._peer, self._read)

    @contextmanager
    def _discarded_on_error(self, upload: _Upload) -> Iterator[None]:
        try:
            yield
        except BaseException:
            upload.file.close()
            self._discarded()
            raise

    def _adopt(self, upload: _Upload) -> None:
        self._tensors.uploads.adopt(upload.types, upload.file, upload.name, self._discarded)
        self._say(pb.LocalReply(uploaded=pb.LocalUploaded(name=upload.name)))

    def _discarded(self) -> None:
        self._held -= 1

    def _download(self, name: str) -> None:
        lent = self._tensors.downloads.lend(name)
        places = [pb.LocalPlace(file=each.file, offset=each.offset, nbytes=each.nbytes) for each in lent.places]
        try:
            if self._say(pb.LocalReply(downloaded=pb.LocalDownloaded(places=places)), lent.files):
                lent.taken()
        finally:
            close_files(lent.files)

    def _say(self, reply: Any, files: list[int] | None = None) -> bool:
        """Answer. False: the client hears of it that this does not fit, or is gone, or does not listen."""
        try:
            send_packet(self._peer, reply, files or ())
        except PacketError as error:
            refusal = pb.LocalRefusal(reason="PACKET_TOO_LARGE", message=str(error))
            with suppress(OSError):
                send_packet(self._peer, pb.LocalReply(refusal=refusal))
            return False
        except OSError:
            self.close()
            return False
        return True


def _is_open_to_ranks() -> bool:
    """Whether other processes of this user may open this one's files below /proc."""
    return ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1
