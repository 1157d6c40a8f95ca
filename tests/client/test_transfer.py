"""Tensors that travel apart: streamed in pieces, put together again bit by bit."""

from __future__ import annotations

import threading

import pytest
import torch

from gradwire import errors
from gradwire.rpc import Rpc
from gradwire.transfer import CHUNK_BYTES, INLINE_BYTES, Uploads, receive
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Handle, TensorData

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def random_tensors() -> list[torch.Tensor]:
    """Every dtype, odd sizes, an empty one, a scalar; above INLINE_BYTES in sum."""
    tensors = [(torch.randn(37, 5) * 3).to(dtype) for dtype in DTYPES]
    return [*tensors, torch.empty(0, 3), torch.tensor(2.5), torch.randn(INLINE_BYTES // 4 + 11)]


def nested(tensors: list[torch.Tensor]):
    data = [from_torch(tensor) for tensor in tensors]
    return {"many": tuple(data[:-1]), "constant": 3, "none": None, "big": [data[-1]]}


class Store:
    """Uploads kept as bytes, and given back as one download."""

    def __init__(self, scripted) -> None:
        self.name = ""
        self.headers: list[tuple[int, tuple[int, ...]]] = []
        self.chunks: list[int] = []
        self.bytes = b""
        scripted.answers |= {"UploadTensors": self.upload, "DownloadTensors": self.download}

    def upload(self, messages, context):
        manifest = next(messages).manifest
        self.name = f"uploads/{manifest.upload_id}"
        self.headers = [(header.dtype, tuple(header.shape)) for header in manifest.tensors]
        pieces = [message.chunk for message in messages]
        self.chunks = [len(piece) for piece in pieces]
        self.bytes = b"".join(pieces)
        return pb.UploadTensorsResponse(name=self.name)

    def download(self, request, context):
        assert request.name == "downloads/d1"
        cut = 777_777  # not where tensors end
        for start in range(0, len(self.bytes), cut):
            yield pb.DownloadTensorsResponse(chunk=self.bytes[start : start + cut])


def test_big_values_go_up_in_pieces_and_come_down_bit_identical(scripted, rpc):
    tensors, store = random_tensors(), Store(scripted)
    (sent,) = Uploads(rpc).send_apart((nested(tensors),))
    assert sent["constant"] == 3 and sent["none"] is None
    assert [leaf.data for leaf in sent["many"]] == [
        Handle(f"{store.name}/tensors/{i}") for i in range(len(tensors) - 1)
    ]
    assert store.headers[-1][1] == tensors[-1].shape
    assert max(store.chunks) == CHUNK_BYTES and len(store.chunks) == -(-len(store.bytes) // CHUNK_BYTES)

    def waiting(index: int) -> TensorData:
        dtype = str(tensors[index].dtype).removeprefix("torch.")
        return TensorData(dtype, tuple(tensors[index].shape), Handle(f"downloads/d1/tensors/{index}"))

    # The reply may name them in any order.
    (received,) = receive(rpc, ({index: waiting(index) for index in reversed(range(len(tensors)))},))
    for index, tensor in enumerate(tensors):
        assert received[index].dtype == tensor.dtype
        assert torch.equal(received[index], tensor)
        received[index].zero_()  # memory of its own


def test_small_values_stay_in_the_request(scripted, rpc):
    values = ({"a": from_torch(torch.ones(3))}, None, (1, from_torch(torch.ones(2))))
    assert Uploads(rpc).send_apart(values) is values
    assert scripted.calls == []


def test_small_results_are_writable_tensors_of_their_own(rpc):
    data = from_torch(torch.ones(3))
    (result,) = receive(rpc, ([data, 2],))
    result[0][0] = 5
    assert result[1] == 2 and torch.equal(receive(rpc, (data,))[0], torch.ones(3))


@pytest.mark.parametrize(("cut", "message"), [(-1, "ended before"), (1, "more bytes")])
def test_download_of_another_size_is_an_error(scripted, rpc, cut, message):
    content = b"x" * (8 + cut)
    scripted.answers["DownloadTensors"] = lambda request, context: iter([pb.DownloadTensorsResponse(chunk=content)])
    with pytest.raises(errors.InternalError, match=message):
        receive(rpc, (TensorData("float32", (2,), Handle("downloads/d1/tensors/0")),))


def test_refused_upload_raises_the_error_of_the_service(scripted, rpc):
    def refuse(messages, context):
        raise errors.ResourceExhausted("held_bytes allows 1", reason="HELD_BYTES_EXHAUSTED")

    scripted.answers["UploadTensors"] = refuse
    with pytest.raises(errors.ResourceExhausted, match="held_bytes"):
        Uploads(rpc).send_apart((from_torch(torch.zeros(INLINE_BYTES)),))


def test_streams_that_stand_still_are_unavailable_after_the_timeout(scripted):
    rpc = Rpc(scripted.target, timeout=0.4)
    still = threading.Event()
    scripted.answers["UploadTensors"] = lambda messages, context: still.wait(10) and pb.UploadTensorsResponse()

    def stand_still(request, context):
        yield pb.DownloadTensorsResponse(chunk=b"1234")
        still.wait(10)

    scripted.answers["DownloadTensors"] = stand_still
    with pytest.raises(errors.Unavailable, match="no bytes"):
        Uploads(rpc).send_apart((from_torch(torch.zeros(4 * INLINE_BYTES)),))
    with pytest.raises(errors.Unavailable, match="no bytes"):
        receive(rpc, (TensorData("float32", (2,), Handle("downloads/d1/tensors/0")),))
    still.set()
    rpc.close()


def test_stream_that_moves_may_take_longer_than_the_timeout(scripted):
    rpc = Rpc(scripted.target, timeout=0.5)
    pause = threading.Event()

    def trickle(request, context):
        for _ in range(5):
            pause.wait(0.25)
            yield pb.DownloadTensorsResponse(chunk=b"\x00" * 4)

    scripted.answers["DownloadTensors"] = trickle
    (tensor,) = receive(rpc, (TensorData("float32", (5,), Handle("downloads/d1/tensors/0")),))
    assert torch.equal(tensor, torch.zeros(5))
    rpc.close()
