"""The SDK's end of shared memory: used where the service is what it says it is, and given up where it is not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from client.local_service import LocalService

from gradwire.deadline import Deadline
from gradwire.local_transport import LocalTransport
from gradwire.memory_files import MappedFile, sealed_file
from gradwire.transfer import Uploads
from gradwire_proto.errors import Unavailable
from gradwire_proto.local_wire import SEALS, close_files, new_socket
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1 import gradient_service_pb2 as service_pb
from gradwire_proto.v1 import local_pb2 as pb
from gradwire_proto.values import TensorData

UPLOADED = pb.LocalReply(uploaded=pb.LocalUploaded(name="uploads/a"))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LocalService]:
    service = LocalService(tmp_path)
    yield service
    service.close()


@pytest.fixture
def transport(service: LocalService) -> Iterator[LocalTransport]:
    """Connected to the service."""
    transport = LocalTransport(lambda seconds: service.path, timeout=0.6)
    transport.offer(service.path)
    assert transport.is_connected
    yield transport
    transport.close()


def two() -> list[TensorData]:
    torch.manual_seed(0)
    return [from_torch(torch.randn(3, 5)), from_torch(torch.arange(100_000))]


def many() -> list[TensorData]:
    """So many bytes that the service's answer is waited for."""
    return [*two(), from_torch(torch.zeros(600_000, dtype=torch.int64))]


def test_upload_comes_sealed_and_whole(service, transport):
    seen: dict[str, Any] = {}

    def answer(request: pb.LocalRequest, files: list[int]) -> tuple[pb.LocalReply, list[int]]:
        import fcntl

        seen["seals"] = fcntl.fcntl(files[0], fcntl.F_GET_SEALS)
        seen["bytes"] = os.pread(files[0], 1 << 20, 0)
        seen["size"] = os.fstat(files[0]).st_size
        return UPLOADED, []

    service.answer = answer
    tensors = many()
    assert transport.upload("a", tensors, Deadline(5))
    assert seen["seals"] == SEALS
    assert seen["bytes"][:60] == tensors[0].data and seen["bytes"][64:800_064] == tensors[1].data
    assert seen["size"] == 800_064 + 4_800_000
    assert service.requests[0].upload.manifest.upload_id == "a"


def test_few_bytes_are_not_waited_for_and_answers_keep_their_order(service, transport):
    released = threading.Event()
    tensors = two()[1:]
    file = sealed_file(tensors)

    def answer(request: pb.LocalRequest, files: list[int]) -> tuple[pb.LocalReply, list[int]]:
        if request.WhichOneof("kind") == "download":
            return downloaded(file, (0, 0, 800_000))
        released.wait(5)
        return UPLOADED, []

    service.answer = answer
    assert all(transport.upload(f"{number}", two(), Deadline(5)) for number in range(3))
    released.set()
    received = transport.download("downloads/a", tensors)
    assert received is not None and torch.equal(received[0], torch.arange(100_000))
    assert all(transport.upload(f"{number}", two(), Deadline(5)) for number in range(20))
    assert transport.upload("last", many(), Deadline(5)) and len(service.requests) == 25
    os.close(file)


def test_what_the_service_would_not_take_is_brought_by_grpc_when_it_is_missed(service, scripted, rpc):
    def take(messages: Any, context: Any) -> Any:
        name = f"uploads/{next(messages).manifest.upload_id}"
        assert sum(len(message.chunk) for message in messages) == 800_060
        return service_pb.UploadTensorsResponse(name=name)

    scripted.answers["UploadTensors"] = take
    rpc.local.offer(service.path)
    uploads = Uploads(rpc, for_read=True)
    (sent,) = uploads.send_apart((two(),))
    assert not scripted.requests("UploadTensors")
    uploads.send_again(Deadline(5))
    names = [service.requests[0].upload.manifest.upload_id, sent[0].data.name.split("/")[1]]
    assert len(scripted.requests("UploadTensors")) == 1 and len(set(names)) == 1


def test_what_the_service_refuses_is_left_to_grpc(service, transport):
    assert not transport.upload("a", many(), Deadline(5))
    assert transport.download("downloads/a", two()) is None
    assert transport.is_connected


@pytest.mark.parametrize("way", ["hangs up", "says nothing", "says nonsense"])
def test_service_that_does_not_answer_is_left_at_once(service, transport, way):
    released = threading.Event()

    def silent(request: pb.LocalRequest, files: list[int]) -> None:
        released.wait(5)

    answers: dict[str, Any] = {
        "hangs up": lambda request, files: None,
        "says nothing": silent,
        "says nonsense": lambda request, files: (pb.LocalRequest(hello=pb.LocalHello()), []),
    }
    service.answer = answers[way]
    start = time.monotonic()
    assert not transport.upload("a", many(), Deadline(5))
    assert transport.download("downloads/a", two()) is None
    assert time.monotonic() - start < 3
    released.set()
    assert transport.is_connected == (way == "says nonsense")


def test_service_that_comes_back_is_found_again(service, tmp_path, monkeypatch):
    monkeypatch.setattr("gradwire.local_transport._PAUSE", 0.05)
    (tmp_path / "other").mkdir()
    other = LocalService(tmp_path / "other")
    found = [Unavailable("not yet"), other.path]

    def find(seconds: float) -> str:
        each = found.pop(0)
        if isinstance(each, Exception):
            raise each
        return each

    transport = LocalTransport(find)
    transport.offer(service.path)
    service.answer = lambda request, files: None
    other.answer = lambda request, files: (UPLOADED, [])
    assert not transport.upload("a", many(), Deadline(5))
    transport.look_again(Deadline(5))
    assert len(found) == 2, "it was looked for at once"
    for is_there in (False, True):
        time.sleep(0.06)
        transport.look_again(Deadline(5))
        assert transport.upload("a", many(), Deadline(5)) == is_there
    transport.close()
    transport.look_again(Deadline(5))
    assert not transport.is_connected and not found
    other.close()


def test_forked_child_leaves_its_parents_connection_alone(service, transport):
    child = os.fork()
    if not child:
        os._exit(
            transport.is_connected
            or transport.upload("child", two(), Deadline(5))
            or transport.download("a", two()) is not None
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert transport.is_connected and not service.requests


def test_socket_of_another_service_is_not_used(tmp_path):
    service = LocalService(tmp_path, says="another")
    transport = LocalTransport(lambda seconds: service.path)
    transport.offer(service.path)
    assert not transport.is_connected
    service.close()


@pytest.mark.parametrize("kind", ["absent", "a file", "nobody listens", "switched off"])
def test_path_that_is_no_socket_of_a_service_is_not_used(service, tmp_path, kind):
    path = tmp_path / "there"
    if kind == "a file":
        path.write_bytes(b"")
    elif kind == "nobody listens":
        lonely = new_socket()
        lonely.bind(str(path))
        lonely.close()
    transport = LocalTransport(lambda seconds: str(path), enabled=kind != "switched off")
    transport.offer(service.path if kind == "switched off" else str(path))
    assert not transport.is_connected and not transport.upload("a", many(), Deadline(5))


def downloaded(file: int, *places: tuple[int, int, int]) -> tuple[pb.LocalReply, list[int]]:
    members = [pb.LocalPlace(file=index, offset=offset, nbytes=nbytes) for index, offset, nbytes in places]
    return pb.LocalReply(downloaded=pb.LocalDownloaded(places=members)), [file]


def test_download_is_mapped_and_its_tensors_are_the_users(service, transport):
    tensors = [from_torch(torch.randn(40_000)), from_torch(torch.empty(0, 3)), from_torch(torch.tensor(True))]
    file = sealed_file(tensors)
    service.answer = lambda request, files: downloaded(file, (0, 0, 160_000), (0, 160_000, 0), (0, 160_000, 1))
    received = transport.download("downloads/a", tensors)
    assert received is not None
    large, empty, flag = received
    assert large.numpy().tobytes() == bytes(tensors[0].data)  # pyright: ignore[reportArgumentType]
    assert empty.shape == (0, 3) and flag.item() is True and flag.shape == ()
    large.zero_()
    large.resize_(10)
    assert os.pread(file, 160_000, 0) == tensors[0].data
    os.close(file)


@pytest.mark.parametrize("places", [[(1, 0, 60)], [(0, -4, 60)], [(0, 1 << 20, 60)], [(0, 0, 61)], []])
def test_places_that_cannot_be_are_left_to_grpc(service, transport, places):
    file = sealed_file(two()[:1])
    service.answer = lambda request, files: downloaded(file, *places)
    assert transport.download("downloads/a", two()[:1]) is None
    os.close(file)


def test_small_tensor_does_not_keep_a_large_file_alive_and_a_saved_one_is_alone():
    tensors = two()
    file = sealed_file(tensors)
    mapped = MappedFile(file, os.fstat(file).st_size)
    small, large = mapped.tensor(tensors[0], 0), mapped.tensor(tensors[1], 64)
    assert small.untyped_storage().nbytes() == 60 and large.untyped_storage().nbytes() == 800_000
    os.close(file)
    del mapped, large
    assert "memfd:gradwire" not in Path("/proc/self/maps").read_text()


def test_threads_share_the_connection_and_each_gets_its_own_answer(service, transport):
    contents = {f"downloads/{index}": torch.full((20_000,), float(index)) for index in range(8)}
    files = {name: sealed_file([from_torch(tensor)]) for name, tensor in contents.items()}
    service.answer = lambda request, _: downloaded(files[request.download.name], (0, 0, 80_000))
    wrong: list[str] = []

    def fetch(name: str) -> None:
        for _ in range(20):
            received = transport.download(name, [from_torch(contents[name])])
            if received is None or not torch.equal(received[0], contents[name]):
                wrong.append(name)

    threads = [threading.Thread(target=fetch, args=(name,)) for name in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    close_files(files.values())
