"""The service's end of shared memory: what clients send is sealed, counted and gone in the end, whatever they do."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import socket
from typing import Any

import pytest
from server.local_peer import Peer, socket_of, upload

from gradwire_proto import codec
from gradwire_proto.local_wire import SEALS, aligned, close_files, new_socket, send_packet, service_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2
from gradwire_proto.values import GradientResult, Handle, TensorData
from gradwire_server.local.local_connection import MOST_UPLOADS
from gradwire_server.local.local_socket import MOST_CONNECTIONS

W = b"\0\0\0\0\0\0\x40\x40"
TENSOR = TensorData("float32", (1, 2), W)


def memory_file(*tensors: TensorData, seals: int = SEALS) -> int:
    """A memfd with these tensors, under these seals."""
    offsets, size = aligned(tensor.nbytes for tensor in tensors)
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.truncate(file, size)
    for tensor, offset in zip(tensors, offsets, strict=True):
        os.pwrite(file, tensor.data, offset)  # pyright: ignore[reportArgumentType]
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def load(name: str, shape: tuple[int, ...] = (1, 2)) -> pb.LoadStateDictRequest:
    request = pb.LoadStateDictRequest(name="models/m")
    codec.encode_named_tensors({"w": TensorData("float32", shape, Handle(f"{name}/tensors/0"))}, request.tensors)
    return request


async def test_service_says_who_it_is(local, peer):
    path = await socket_of(local)
    reply, _ = await peer.ask(local_pb2.LocalRequest(hello=local_pb2.LocalHello()))
    assert reply.welcome.service == service_of(path)
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("settings", [{"shared_memory": False}, {"listen": "0.0.0.0:0"}])
async def test_no_socket_where_it_is_off_or_clients_are_elsewhere(start, tmp_path, settings):
    async with start(sockets=tmp_path, **settings) as frontend:
        assert await socket_of(frontend) == ""
        assert not list(tmp_path.glob("*.sock"))


async def test_sealed_file_is_an_upload_that_a_request_uses(local, peer, fakes, open_files):
    before = open_files()
    upload_id = fakes.request_id()
    reply = await peer.upload(upload_id, memory_file(TENSOR), TENSOR)
    assert reply.uploaded.name == f"uploads/{upload_id}" and not local.files
    assert open_files() == before + 1
    await local.stub.LoadStateDict(load(reply.uploaded.name))
    assert bytes(local.cluster.groups["m"].weights.data) == W
    assert open_files() == before


async def test_upload_that_comes_again_by_either_way_is_held_once(local, peer, fakes, open_files):
    before = open_files()
    upload_id = fakes.request_id()
    for _ in range(2):
        assert (await peer.upload(upload_id, memory_file(TENSOR), TENSOR)).uploaded.name
    assert await local.upload(TENSOR, chunks=[], upload_id=upload_id) == f"uploads/{upload_id}"
    assert open_files() == before + 1
    wide = TensorData("float32", (2, 1), W)
    assert (await peer.upload(upload_id, memory_file(wide), wide)).refusal.reason == "UPLOAD_ID_REUSED"
    assert open_files() == before + 1


async def test_upload_that_was_brought_by_grpc_and_used_meanwhile_is_not_kept(local, peer, fakes, open_files):
    before = open_files()
    upload_id = fakes.request_id()
    await local.stub.LoadStateDict(load(await local.upload(TENSOR, upload_id=upload_id)))
    assert (await peer.upload(upload_id, memory_file(TENSOR), TENSOR)).uploaded.name == f"uploads/{upload_id}"
    assert open_files() == before and not local.files


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
async def test_file_that_its_sender_could_still_change_is_refused(local, peer, fakes, missing, open_files):
    before = open_files()
    reply = await peer.upload(fakes.request_id(), memory_file(TENSOR, seals=SEALS & ~missing), TENSOR)
    assert reply.refusal.reason == "UPLOAD_NOT_SEALED" and open_files() == before


async def test_file_that_is_no_memory_is_refused(local, peer, fakes, tmp_path):
    (tmp_path / "file").write_bytes(W.ljust(64))
    file = os.open(tmp_path / "file", os.O_RDWR)
    reply = await peer.upload(fakes.request_id(), file, TENSOR)
    assert reply.refusal.reason == "UPLOAD_NOT_SEALED"
    reader, writer = os.pipe()
    os.close(writer)
    assert (await peer.upload(fakes.request_id(), reader, TENSOR)).refusal.reason == "UPLOAD_NOT_SEALED"


@pytest.mark.parametrize(("count", "reason"), [(0, "UPLOAD_TOO_SHORT"), (2, "UPLOAD_TOO_LONG")])
async def test_file_of_another_size_is_refused(local, peer, fakes, count, reason):
    reply = await peer.upload(fakes.request_id(), memory_file(*[TENSOR] * count), TENSOR)
    assert reply.refusal.reason == reason


@pytest.mark.parametrize("size", [3, 300 << 10])
async def test_bool_that_is_none_is_refused(local, peer, fakes, size, open_files):
    before = open_files()
    wrong = TensorData("bool", (size,), b"\1" * (size - 1) + b"\2")
    reply = await peer.upload(fakes.request_id(), memory_file(TENSOR, wrong), TENSOR, wrong)
    assert (reply.refusal.reason, open_files()) == ("TENSOR_NOT_BOOL", before)


async def test_uploads_count_as_held_and_go_when_their_time_is_over(start, tmp_path, fakes, open_files):
    async with start(sockets=tmp_path, held_bytes=1000, held_seconds=0.2) as frontend:
        peer = Peer(await socket_of(frontend))
        await peer.ask(local_pb2.LocalRequest(hello=local_pb2.LocalHello()))
        before = open_files()
        small, big = TensorData("uint8", (640,), bytes(640)), TensorData("uint8", (704,), bytes(704))
        assert (await peer.upload(fakes.request_id(), memory_file(small), small)).uploaded.name
        assert (await peer.upload(fakes.request_id(), memory_file(big), big)).refusal.reason == "HELD_BYTES_EXHAUSTED"
        await frontend.until(lambda: open_files() == before)
        assert (await peer.upload(fakes.request_id(), memory_file(big), big)).uploaded.name
        peer.socket.close()


async def test_connection_holds_only_so_many_files(local, peer, fakes, open_files):
    before, last = open_files(), ""
    for _ in range(MOST_UPLOADS):
        last = (await peer.upload(fakes.request_id(), memory_file(TENSOR), TENSOR)).uploaded.name
    reply = await peer.upload(fakes.request_id(), memory_file(TENSOR), TENSOR)
    assert reply.refusal.reason == "TOO_MANY_UPLOADS" and open_files() == before + MOST_UPLOADS
    # One that was used makes room.
    await local.stub.LoadStateDict(load(last))
    assert (await peer.upload(fakes.request_id(), memory_file(TENSOR), TENSOR)).uploaded.name


async def test_all_connections_together_hold_only_so_many_files(local, fakes, monkeypatch):
    monkeypatch.setattr("gradwire_server.local.local_connection.MOST_OPEN_FILES", 2)
    reasons = []
    for _ in range(3):
        # Each leaves what it has brought behind.
        peer = Peer(await socket_of(local))
        reasons.append((await peer.upload(fakes.request_id(), memory_file(TENSOR), TENSOR)).refusal.reason)
        peer.socket.close()
    assert reasons == ["", "", "TOO_MANY_UPLOADS"]


async def test_client_that_comes_when_no_file_can_be_opened_is_let_in_later_and_keeps_nobody_busy(local, monkeypatch):
    monkeypatch.setattr("gradwire_server.local.local_socket._PAUSE_SECONDS", 0.1)
    path = await socket_of(local)
    tries: list[int] = []

    class Full:
        """A listener of a process that has too many open files."""

        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener

        def fileno(self) -> int:
            return self._listener.fileno()

        def close(self) -> None:
            self._listener.close()

        def accept(self) -> Any:
            tries.append(1)
            if len(tries) == 1:
                raise OSError(errno.EMFILE, "too many open files")
            return self._listener.accept()

    at = local.service._local
    monkeypatch.setattr(at, "_listener", Full(at._listener))
    peer = Peer(path)
    await asyncio.sleep(0.05)
    assert len(tries) == 1
    assert (await peer.ask(local_pb2.LocalRequest(hello=local_pb2.LocalHello())))[0].welcome.service
    peer.socket.close()


async def test_socket_of_a_service_that_was_killed_is_removed(start, tmp_path):
    dead = new_socket()
    dead.bind(str(tmp_path / "clients-dead.sock"))
    dead.close()
    async with start(sockets=tmp_path) as frontend:
        assert [str(path) for path in tmp_path.glob("*.sock")] == [await socket_of(frontend)]


async def test_only_so_many_clients_are_connected(local):
    path = await socket_of(local)
    peers = [Peer(path) for _ in range(MOST_CONNECTIONS)]
    hello = local_pb2.LocalRequest(hello=local_pb2.LocalHello())
    for peer in peers:
        await peer.ask(hello)
    late = Peer(path)
    assert await late.is_cut_off()
    peers.pop().socket.close()
    await asyncio.sleep(0.05)
    assert (await Peer(path).ask(hello))[0].welcome.service
    for peer in [late, *peers]:
        peer.socket.close()


async def test_packet_that_is_none_ends_the_connection_and_nothing_else(local, fakes, open_files):
    path = await socket_of(local)
    before = open_files()
    for packet in (b"\xff\xff", b"x" * (100 << 10)):
        peer = Peer(path)
        file = memory_file(TENSOR)
        socket.send_fds(peer.socket, [packet], [file] * 5)
        os.close(file)
        assert await peer.is_cut_off()
        peer.socket.close()
    assert open_files() == before
    peer = Peer(path)
    unknown = local_pb2.LocalRequest.FromString(b"\x7a\x01x")
    reasons = [(await peer.ask(each))[0].refusal.reason for each in (unknown, upload("", TENSOR), upload("x", TENSOR))]
    assert reasons == ["UNKNOWN_FIELD", "FIELD_MISSING", "UPLOAD_ID_INVALID"]
    peer.socket.close()
    assert (await local.model()).name == "models/m"


async def test_client_that_dies_leaves_no_file_open(local, fakes, open_files):
    path = await socket_of(local)
    before = open_files()
    peer = Peer(path)
    file = memory_file(TENSOR)
    # Without waiting for an answer.
    for _ in range(3):
        send_packet(peer.socket, upload(fakes.request_id(), TENSOR), [file])
    os.close(file)
    peer.socket.close()
    await asyncio.sleep(0.1)
    # At most what it had sent whole: that goes unused when its time is over, as uploads by gRPC do.
    assert open_files() <= before + 3
    local.tenant.tensors.uploads.close()
    assert open_files() == before


async def downloadable(frontend: Any, content: bytes) -> str:
    """The name of a download with this content."""
    gradients = {"w": TensorData("uint8", (len(content),), content)}
    frontend.cluster.groups["m"].result = GradientResult(loss=0.5, step=0, num_examples=1, gradients=gradients)
    request = pb.ComputeGradientsRequest(name="models/m", max_inline_bytes=1)
    codec.encode_batch(codec.decode_batch(frontend.train().batch), request.batch)
    reply = codec.decode_gradient_result(await frontend.stub.ComputeGradients(request))
    return reply.gradients["w"].data.name.partition("/tensors/")[0]  # pyright: ignore[reportAttributeAccessIssue]


async def test_download_is_lent_once_and_its_file_goes_when_nobody_has_it(local, peer, open_files):
    before = open_files()
    name = await downloadable(local, b"content")
    reply, (file,) = await peer.download(name)
    (place,) = reply.downloaded.places
    assert os.pread(file, place.nbytes, place.offset) == b"content"
    assert (await peer.download(name))[0].refusal.reason == "DOWNLOAD_NOT_FOUND"
    lent = local.tenant.tensors.downloads._lent
    lent._sweep(idle=0.0)
    assert len(local.files) == 1 and lent.nbytes
    os.close(file)
    lent._sweep(idle=0.0)
    assert not local.files and not lent.nbytes and open_files() == before


async def test_what_a_client_does_to_its_download_nobody_else_sees(local, peer):
    first, second = await downloadable(local, b"a" * 8192), await downloadable(local, b"b" * 8192)
    _, (file,) = await peer.download(first)
    os.truncate(f"/proc/self/fd/{file}", 0)
    with open(f"/proc/self/fd/{file}", "r+b") as hostile:
        hostile.write(b"evil" * 4096)
    assert await local.download(second) == b"b" * 8192
    third = await downloadable(local, b"c" * 8192)
    _, (other,) = await peer.download(third)
    assert os.pread(other, 8192, 0) == b"c" * 8192
    close_files((file, other))


async def test_clients_that_keep_too_much_get_no_more(start, tmp_path, open_files):
    async with start(sockets=tmp_path, held_bytes=40_000) as frontend:
        await frontend.create()
        peer = Peer(await socket_of(frontend))
        kept = []
        for _ in range(2):
            _, (file,) = await peer.download(await downloadable(frontend, bytes(8192)))
            kept.append(mmap.mmap(file, 8192, access=mmap.ACCESS_COPY))
            os.close(file)
        name = await downloadable(frontend, bytes(8192))
        assert (await peer.download(name))[0].refusal.reason == "LENT_BYTES_EXHAUSTED"
        assert await frontend.download(name) == bytes(8192)
        name = await downloadable(frontend, bytes(8192))
        kept.pop().close()
        _, files = await peer.download(name)
        assert len(files) == 1
        close_files(files)
        kept.pop().close()
        peer.socket.close()


async def test_download_that_is_being_streamed_is_not_lent(local, peer):
    name = await downloadable(local, bytes(64 << 20))
    stream = local.stub.DownloadTensors(pb.DownloadTensorsRequest(name=name))
    assert (await stream.read()).chunk
    assert (await peer.download(name))[0].refusal.reason == "DOWNLOAD_IN_USE"
    stream.cancel()


async def test_end_of_the_service_removes_its_socket_and_what_was_lent(start, tmp_path):
    async with start(sockets=tmp_path) as frontend:
        await frontend.create()
        path = await socket_of(frontend)
        peer = Peer(path)
        _, (file,) = await peer.download(await downloadable(frontend, b"content"))
    assert not os.path.exists(path) and not frontend.files
    assert os.pread(file, 7, 0) == b"content"
    assert await peer.is_cut_off()
    os.close(file)
    peer.socket.close()
