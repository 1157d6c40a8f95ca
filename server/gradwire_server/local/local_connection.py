"""One client on the machine of the service, which shares memory or makes calls: its requests, one by one.

Nothing that a client sends is waited for, and nothing that it does to its own files afterwards reaches anybody else:
uploads are sealed, and downloads are the client's alone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from gradwire_proto.codec import refuse_unknown_fields
from gradwire_proto.errors import GradwireError, InvalidArgument, ResourceExhausted, Unauthenticated
from gradwire_proto.local_wire import (
    MOST_FILES,
    PACKET_BYTES,
    PacketError,
    close_files,
    receive_packet,
    send_packet,
)
from gradwire_proto.v1 import local_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.doors.door import Door
from gradwire_server.local.call_files import response_file
from gradwire_server.local.local_calls import Answer, LocalCalls
from gradwire_server.tensors.downloads import Lent
from gradwire_server.tensors.file_threads import THREAD_BYTES, in_thread
from gradwire_server.tensors.held_files import TensorType
from gradwire_server.tensors.sealed_files import SealedFile
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.tensors.tensor_streams import decode_manifest

logger = logging.getLogger(__name__)

MOST_UPLOADS = 32
"""Uploads of one connection that are held at once, each with an open file."""

MOST_OPEN_FILES = 256
"""The same of all connections together, those that have ended included."""


_IN_PACKET_BYTES = PACKET_BYTES - 256
"""Bytes of a response, with what comes along, from which on it travels in a file."""

_MOST_PLACES = 1024
"""Tensors that come along with a response at most: their places must fit into its packet."""


class LocalPlace(Protocol):
    """What answers the requests of one owner."""

    @property
    def calls(self) -> LocalCalls: ...

    @property
    def tensors(self) -> TensorStore: ...


@dataclass(slots=True)
class Held:
    """How many uploads are held."""

    count: int = 0


@dataclass(frozen=True, slots=True)
class _Upload:
    store: TensorStore
    file: SealedFile
    types: Sequence[TensorType]
    name: str


class LocalConnection:
    """One client. Its requests are answered one after another."""

    def __init__(
        self,
        peer: socket.socket,
        door: Door[LocalPlace],
        limits: Limits,
        service: str,
        all_held: Held,
        ended: Callable[[LocalConnection], None],
    ) -> None:
        self._peer = peer
        self._door = door
        self._guest = door.everybody
        """Who has said hello; where all may come in, anybody."""
        self._limits = limits
        self._service = service
        self._ended = ended
        self._held = Held()
        self._all_held = all_held
        self._loop = asyncio.get_running_loop()
        self._checking: asyncio.Task[None] | None = None
        self._calling: asyncio.Future[Answer] | None = None
        self._loop.add_reader(peer, self._read)

    def close(self) -> None:
        """Hang up."""
        if self._peer.fileno() >= 0:
            self._loop.remove_reader(self._peer)
            self._peer.close()
            if self._calling is not None:
                self._calling.cancel()
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
            if self._calling is not None:
                # It speaks without waiting for its answer.
                self.close()
                return
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
            self._say(pb.LocalReply(refusal=pb.LocalRefusal(reason=error.reason, message=str(error))))
        except Exception:
            logger.exception("a request for shared memory failed")
            self.close()

    def _do(self, request: pb.LocalRequest, files: list[int]) -> None:
        refuse_unknown_fields(request)
        match request.WhichOneof("kind"):
            case "hello":
                self._guest = self._door.admit_token(request.hello.token)
                self._say(pb.LocalReply(welcome=pb.LocalWelcome(service=self._service)))
            case "call":
                self._call(request.call, files)
            case "upload":
                self._upload(request.upload, files)
            case "download":
                self._download(request.download.name)
            case _:
                raise InvalidArgument("expected a request", field="kind", reason="FIELD_MISSING")

    def _call(self, request: pb.LocalCall, files: Sequence[int]) -> None:
        """The connection is watched meanwhile: a client that hangs up gives its call up."""

        is_answered = False

        def answer(answer: Answer) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                self._calling = None
                with self._refusals():
                    self._answer(answer, place.tensors)

        place = self._place(request.method)
        calling = place.calls.begin(request, files, answer, self._check_scope)
        if not is_answered:
            self._calling = calling
            calling.add_done_callback(lambda ended: None if ended.cancelled() else answer(ended.result()))

    def _check_scope(self, method: str, request: Any) -> None:
        assert self._guest is not None, "it was let in"
        self._guest.check_scope(method, request)

    def _answer(self, answer: Answer, tensors: TensorStore) -> None:
        if answer.error is not None:
            self._say(pb.LocalReply(error=answer.error))
            return
        reply = pb.LocalReply(response=answer.response)
        if not answer.download and len(answer.response) < _IN_PACKET_BYTES:
            self._say(reply)
            return
        files: list[int] = []
        try:
            lent = _bring(tensors, answer.download, reply, files) if answer.download else None
            if reply.ByteSize() >= _IN_PACKET_BYTES:
                files.append(response_file(answer.response))
                reply.response, reply.response_bytes = b"", len(answer.response)
            if self._say(reply, files) and lent is not None:
                lent.taken()
        finally:
            close_files(files)

    def _place(self, method: str) -> LocalPlace:
        """What answers a call of this method. Raises Unauthenticated, PermissionDenied."""
        if self._guest is None:
            raise Unauthenticated("expected a hello first", reason="TOKEN_MISSING")
        self._door.check_method(self._guest, method)
        return self._guest.place

    def _upload(self, request: pb.LocalUpload, files: list[int]) -> None:
        """Takes the one file over, out of `files`."""
        place = self._place("UploadTensors")
        types, name = decode_manifest(request.manifest, self._limits)
        if name is None or len(files) != 1:
            raise InvalidArgument("expected an upload_id and one file", field="manifest", reason="FIELD_MISSING")
        if self._held.count >= MOST_UPLOADS or self._all_held.count >= MOST_OPEN_FILES:
            message = f"{self._held.count} uploads of this client, and {self._all_held.count} of all, wait to be used"
            raise ResourceExhausted(message, reason="TOO_MANY_UPLOADS", retryable=True)
        upload = _Upload(place.tensors, SealedFile(files.pop(), types), types, name)
        for held in (self._held, self._all_held):
            held.count += 1
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
        upload.store.uploads.adopt(upload.types, upload.file, upload.name, self._discarded)
        self._say(pb.LocalReply(uploaded=pb.LocalUploaded(name=upload.name)))

    def _discarded(self) -> None:
        for held in (self._held, self._all_held):
            held.count -= 1

    def _download(self, name: str) -> None:
        lent = self._place("DownloadTensors").tensors.downloads.lend(name)
        try:
            if self._say(pb.LocalReply(downloaded=pb.LocalDownloaded(places=_places(lent))), lent.files):
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


def _places(lent: Lent) -> list[pb.LocalPlace]:
    return [pb.LocalPlace(file=each.file, offset=each.offset, nbytes=each.nbytes) for each in lent.places]


def _bring(tensors: TensorStore, download: str, reply: pb.LocalReply, files: list[int]) -> Lent | None:
    """Send the tensors along that are to be downloaded; None where the client has to ask for them."""
    try:
        lent = tensors.downloads.lend(download)
    except GradwireError:
        return None
    if len(lent.files) >= MOST_FILES or len(lent.places) > _MOST_PLACES:
        close_files(lent.files)
        return None
    files += lent.files
    reply.brought.name = download
    reply.brought.places.extend(_places(lent))
    return lent
