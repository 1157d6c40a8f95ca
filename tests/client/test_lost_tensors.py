"""Tensors that travel apart from their call, and are lost on the way: they go again under the name that they had."""

from __future__ import annotations

import grpc
import pytest
import torch
from torch import nn

import gradwire
from gradwire import errors
from gradwire.rpc import Rpc
from gradwire.transfer import INLINE_BYTES, Uploads, receive
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import ForwardResult, Handle, ModelInfo, TensorData

ROWS = INLINE_BYTES // 4 + 11


class Held:
    """Keeps uploads by name, gives one download after another, and can forget all, as a service that was restarted."""

    def __init__(self, scripted) -> None:
        self.uploads: dict[str, bytes] = {}
        self.arrivals: list[str] = []
        self.requests: list[bytes] = []
        self.applied: dict[str, bytes] = {}
        self.downloads: dict[str, bytes] = {}
        self.scripted = scripted
        scripted.answers |= {
            "UploadTensors": self.upload,
            "LoadStateDict": self.load,
            "GetStateDict": self.read,
            "Forward": self.forward,
            "DownloadTensors": self.download,
        }

    def forget(self) -> None:
        self.uploads.clear()
        self.downloads.clear()

    def upload(self, messages, context):
        name = f"uploads/{next(messages).manifest.upload_id}"
        self.arrivals.append(name)
        self.uploads[name] = b"".join(message.chunk for message in messages)
        return pb.UploadTensorsResponse(name=name)

    def load(self, request, context):
        """Applied once, with the bytes of its upload."""
        self.requests.append(request.SerializeToString())
        if request.request_id not in self.applied:
            name = request.tensors[0].tensor.handle.rpartition("/tensors/")[0]
            if name not in self.uploads:
                raise errors.ModelNotFound(f"no uploaded tensor {name}", reason="UPLOAD_NOT_FOUND")
            self.applied[request.request_id] = self.uploads.pop(name)
        return pb.LoadStateDictResponse(step=1)

    def read(self, request, context):
        """Another download at each call."""
        response = pb.GetStateDictResponse()
        codec.encode_named_tensors({"w": self.hold()}, response.tensors)
        return response

    def forward(self, request, context):
        """A command: the same reply, with the same download, to each repeat."""
        self.requests.append(request.SerializeToString())
        if request.request_id not in self.applied:
            result = ForwardResult(outputs=self.hold(), step=0)
            self.applied[request.request_id] = codec.encode_forward_result(result).SerializeToString()
        return pb.ForwardResponse.FromString(self.applied[request.request_id])

    def hold(self) -> TensorData:
        name = f"downloads/d{len(self.scripted.calls)}"
        self.downloads[name] = torch.arange(ROWS, dtype=torch.float32).numpy().tobytes()
        return TensorData("float32", (ROWS,), Handle(f"{name}/tensors/0"))

    def download(self, request, context):
        if request.name not in self.downloads:
            raise errors.ModelNotFound("no such download", reason="DOWNLOAD_NOT_FOUND")
        content = self.downloads[request.name]
        pieces = (content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20))
        return (pb.DownloadTensorsResponse(chunk=piece) for piece in pieces)


@pytest.fixture
def held(scripted) -> Held:
    return Held(scripted)


@pytest.fixture
def model(held_model) -> gradwire.Model:
    return held_model(nn.Linear(2, 1), "mse_loss", (torch.zeros(3, 2), torch.zeros(3, 1)))


def values(number: float) -> torch.Tensor:
    return torch.full((ROWS,), number)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


# --- uploads --------------------------------------------------------------------------------------------------------


def test_upload_that_is_cut_starts_again_under_its_name(cut_rpc, proxy, held):
    proxy.up_left = 2 << 20
    tensor = torch.randn(ROWS)
    sent = Uploads(cut_rpc).send_apart((from_torch(tensor),))[0]
    assert proxy.up_left is None, "nothing was cut"
    name = sent.data.name.rpartition("/tensors/")[0]
    assert set(held.arrivals) == {name} and held.uploads[name] == as_bytes(tensor)


def test_upload_whose_answer_is_lost_is_sent_again_under_its_name(rpc, held, scripted):
    def lose_the_first(messages, context):
        response = held.upload(messages, context)
        return response if len(held.arrivals) > 1 else context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    scripted.answers["UploadTensors"] = lose_the_first
    Uploads(rpc).send_apart((from_torch(torch.randn(ROWS)),))
    assert len(held.arrivals) == 2 and len(set(held.arrivals)) == 1


def test_upload_to_a_service_that_stays_away_ends_with_the_timeout(scripted):
    scripted.stop()
    rpc = Rpc(scripted.target, timeout=0.5)
    with pytest.raises(errors.Unavailable) as caught:
        Uploads(rpc).send_apart((from_torch(torch.randn(ROWS)),))
    assert caught.value.reason == "NOT_CONNECTED"
    rpc.close()


def test_upload_is_in_flight_when_the_client_is_closed(scripted):
    rpc = Rpc(scripted.target, timeout=5.0)
    scripted.answers["UploadTensors"] = lambda messages, context: rpc.close() or scripted.release.wait(10)
    with pytest.raises(errors.Cancelled):
        Uploads(rpc).send_apart((from_torch(torch.randn(ROWS)),))


def test_tensors_that_the_service_lost_before_the_call_go_up_again_and_the_request_is_the_same(model, held, scripted):
    lost = []

    def load(request, context):
        if not lost:
            lost.append(request)
            held.forget()
        return held.load(request, context)

    scripted.answers["LoadStateDict"] = load
    model.load_state_dict({"weight": values(3.0)})
    assert len(held.arrivals) == 2 and len(set(held.arrivals)) == 1
    assert len(held.requests) == 2 and len(set(held.requests)) == 1
    assert list(held.applied.values()) == [as_bytes(values(3.0))]


@pytest.mark.parametrize("applied", [True, False])
def test_upload_that_is_refused_when_it_goes_again_says_what_became_of_the_command(model, held, scripted, applied):
    state = model_pb2.COMMAND_STATE_APPLIED if applied else model_pb2.COMMAND_STATE_NOT_APPLIED
    scripted.answers["GetCommand"] = lambda request, context: model_pb2.Command(name=request.name, state=state)

    def load(request, context):
        if len(scripted.requests("LoadStateDict")) == 1:
            # Perhaps it was applied: the answer is lost.
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        raise errors.ModelNotFound("no uploaded tensor", reason="UPLOAD_NOT_FOUND")

    def upload(messages, context):
        if held.arrivals:
            raise errors.ResourceExhausted("the disk is full", reason="STORAGE_FULL")
        return held.upload(messages, context)

    scripted.answers |= {"LoadStateDict": load, "UploadTensors": upload}
    with pytest.raises(errors.ResourceExhausted, match="the disk is full") as caught:
        model.load_state_dict({"weight": values(3.0)})
    assert caught.value.request_id == scripted.requests("LoadStateDict")[0].request_id
    assert caught.value.outcome == ("applied" if applied else "not_applied")


def test_upload_that_is_refused_when_it_goes_again_names_the_command_that_was_not_applied(model, held, scripted):
    def upload(messages, context):
        if held.arrivals:
            raise errors.ResourceExhausted("the disk is full", reason="STORAGE_FULL")
        return held.upload(messages, context)

    scripted.answers["UploadTensors"] = upload
    scripted.answers["LoadStateDict"] = lambda request, context: held.forget() or held.load(request, context)
    with pytest.raises(errors.ResourceExhausted, match="the disk is full") as caught:
        model.load_state_dict({"weight": values(3.0)})
    assert caught.value.request_id == scripted.requests("LoadStateDict")[0].request_id
    assert caught.value.outcome == "not_applied" and scripted.requests("GetCommand") == []


def test_upload_that_breaks_when_it_goes_again_is_tried_until_it_arrives(model, held, scripted):
    def load(request, context):
        if not held.requests:
            held.forget()
        return held.load(request, context)

    def upload(messages, context):
        response = held.upload(messages, context)
        if len(held.arrivals) in (2, 3):
            held.forget()
            raise errors.Unavailable("stops", reason="DRAINING")
        return response

    scripted.answers |= {"LoadStateDict": load, "UploadTensors": upload}
    model.load_state_dict({"weight": values(3.0)})
    assert len(held.arrivals) == 4 and len(held.requests) == 2
    assert list(held.applied.values()) == [as_bytes(values(3.0))]


def test_tensors_of_a_future_that_are_lost_go_up_again_as_they_were_when_it_was_made(model, held, scripted):
    weights = values(3.0)

    def load(request, context):
        if not held.requests:
            held.forget()
        return held.load(request, context)

    scripted.answers["LoadStateDict"] = load
    scripted.answers["ZeroGrad"] = lambda request, context: scripted.release.wait(0.3) or pb.ZeroGradResponse()
    # It waits for its turn, and the user goes on.
    first, future = model.futures.zero_grad(), model.futures.load_state_dict({"weight": weights})
    assert not first.done()
    weights.fill_(4.0)
    future.result(5)
    assert len(held.arrivals) == 2
    assert list(held.applied.values()) == [as_bytes(values(3.0))]


def test_service_that_never_has_the_tensors_is_told_so_within_the_timeout(scripted, held):
    rpc = Rpc(scripted.target, timeout=0.5)
    info = ModelInfo(
        id="mine",
        state="ready",
        step=0,
        workers=1,
        sharding=None,
        num_parameters=1,
        optimizer=None,
        loss=None,
        labels={},
        created_at=0.0,
    )
    scripted.answers["GetCommand"] = lambda request, context: model_pb2.Command(
        state=model_pb2.COMMAND_STATE_NOT_APPLIED
    )
    scripted.answers["LoadStateDict"] = lambda request, context: held.forget() or held.load(request, context)
    with pytest.raises(errors.GradwireError) as caught:
        gradwire.Model(rpc, info).load_state_dict({"weight": values(3.0)})
    assert caught.value.outcome == "not_applied" and not held.applied
    assert len(held.arrivals) > 1
    rpc.close()


# --- downloads ------------------------------------------------------------------------------------------------------


def test_read_whose_tensors_are_gone_is_repeated_as_a_whole(model, held, scripted):
    def download(request, context):
        if len(scripted.requests("DownloadTensors")) == 1:
            held.forget()
        return held.download(request, context)

    scripted.answers["DownloadTensors"] = download
    assert torch.equal(model.state_dict()["w"], torch.arange(ROWS, dtype=torch.float32))
    assert len(scripted.requests("GetStateDict")) == 2


def test_read_whose_tensors_are_cut_off_is_repeated_as_a_whole(cut_rpc, proxy, held, scripted):
    proxy.down_left = 2 << 20
    request = pb.GetStateDictRequest(name="models/m", max_inline_bytes=1)

    def finish(reply):
        return receive(cut_rpc, (codec.decode_named_tensors(reply.tensors),))[0]

    received = cut_rpc.call("GetStateDict", request, finish=finish)
    assert proxy.down_left is None, "nothing was cut"
    assert torch.equal(received["w"], torch.arange(ROWS, dtype=torch.float32))
    assert len(scripted.requests("GetStateDict")) == 2


def test_commands_tensors_that_are_cut_off_are_asked_for_again_and_it_runs_once(model, held, scripted):
    def download(request, context):
        pieces = held.download(request, context)
        yield next(pieces)
        if len(scripted.requests("DownloadTensors")) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        yield from pieces

    scripted.answers["DownloadTensors"] = download
    outputs = model.forward(torch.zeros(3, 2), training=True)
    assert torch.equal(outputs, torch.arange(ROWS, dtype=torch.float32))
    assert len(held.requests) == 2 and len(set(held.requests)) == 1 and len(held.applied) == 1


def test_commands_tensors_that_are_gone_for_good_are_an_error_that_says_that_it_was_applied(model, held, scripted):
    scripted.answers["DownloadTensors"] = lambda request, context: held.forget() or held.download(request, context)
    with pytest.raises(errors.ModelNotFound) as caught:
        model.forward(torch.zeros(3, 2), training=True)
    assert (caught.value.reason, caught.value.outcome) == ("DOWNLOAD_NOT_FOUND", "applied")
    assert caught.value.request_id == next(iter(held.applied))
    assert len(held.requests) == 2 and scripted.requests("GetCommand") == []
