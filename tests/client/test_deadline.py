"""A call has one time, in however many requests: none of them starts it anew."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from client.one_model import batch, net
from torch import nn

import gradwire
from gradwire import errors, optim
from gradwire.deadline import Deadline
from gradwire.rpc import Rpc
from gradwire.transfer import INLINE_BYTES, Uploads, inline_bytes, receive
from gradwire.variants import without_graph
from gradwire_proto import codec
from gradwire_proto.local_wire import new_socket, receive_packet, send_packet
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1 import dataset_pb2, local_pb2
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import DatasetInfo, ForwardResult, Handle, TensorData

TIME, SLOW = 1.5, 0.9
"""Of a call, and of each of the two requests that it makes: seconds."""

LATE = (errors.DeadlineExceeded, errors.Unavailable)
"""The second where a busy machine did not say in time what became of it."""

# What a busy machine may add: still no hang.
SLACK = 0.7


@pytest.fixture
def hurried(scripted):
    """A client whose calls have little time."""
    with gradwire.connect(scripted.target, timeout=TIME) as sdk:
        yield sdk


@pytest.fixture
def silent_socket(tmp_path):
    """The path of a service's socket that welcomes one client, and never answers it."""
    listener, peers = new_socket(), []
    listener.bind(str(tmp_path / "silent.sock"))
    listener.listen()

    def welcome() -> None:
        peers.append(listener.accept()[0])
        receive_packet(peers[0], local_pb2.LocalRequest)
        send_packet(peers[0], local_pb2.LocalReply(welcome=local_pb2.LocalWelcome(service="silent")))

    threading.Thread(target=welcome, daemon=True).start()
    yield str(tmp_path / "silent.sock")
    for each in (listener, *peers):
        each.close()


def slow_down(scripted, *methods: str) -> None:
    for method in methods:
        answer = scripted.answers[method]
        scripted.answers[method] = lambda request, context, answer=answer: (
            scripted.release.wait(SLOW) or answer(request, context)
        )


def scale() -> nn.Module:
    class Scale(nn.Module):
        """Each number of features has a graph of its own."""

        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.factor * x if x.shape[1] % 2 else x * self.factor

    return Scale()


def pair(features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, features), torch.randn(5, features)


def test_bringing_a_variant_and_the_step_that_needs_it_share_the_time(hurried, hosted, scripted):
    model = hurried.create_model(scale(), loss="mse_loss", optimizer=optim.SGD(), example=pair(3))
    slow_down(scripted, "AddVariant", "TrainStep")
    with pytest.raises(LATE, match=r"within 1\.5 s"):
        model.train_step(*pair(4))
    assert scripted.requests("TrainStep")
    model.train_step(*pair(4))


def test_asking_for_variants_and_the_step_share_the_time(sdk, hurried, hosted, scripted):
    made = sdk.create_model(scale(), loss="mse_loss", optimizer=optim.SGD(), example=pair(3))
    found = hurried.get_model(made.id)
    made.train_step(*pair(4))
    variant = codec.decode_variant(scripted.requests("AddVariant")[0].variant)
    hosted.info = replace(hosted.info, variants=(*hosted.info.variants, without_graph(variant)))
    slow_down(scripted, "GetModel", "TrainStep")
    with pytest.raises(LATE, match=r"within 1\.5 s"):
        found.train_step(*pair(4))
    assert len(scripted.requests("TrainStep")) == 2


def test_bringing_a_function_that_was_forgotten_is_part_of_the_call_that_needs_it(hurried, scripted):
    def forget(request, context):
        scripted.release.wait(SLOW)
        raise errors.FailedPrecondition("unknown function", reason="FUNCTION_UNKNOWN")

    scripted.answers["ComputeGradients"] = forget
    started = time.monotonic()
    with pytest.raises(LATE):
        hurried.grad(lambda x: (x * x).sum())(torch.ones(3))
    assert len(scripted.requests("ComputeGradients")) == 2 and time.monotonic() - started > TIME / 2


@pytest.mark.parametrize(
    ("method", "page", "listing"),
    [
        ("ListModels", pb.ListModelsResponse, "list_models"),
        ("ListCheckpoints", pb.ListCheckpointsResponse, "list_checkpoints"),
        ("ListDatasets", dataset_pb2.ListDatasetsResponse, "list_datasets"),
    ],
)
def test_pages_of_a_listing_share_the_time(hurried, scripted, method, page, listing):
    scripted.answers[method] = lambda request, context: page(next_page_token="" if request.page_token else "next")
    slow_down(scripted, method)
    with pytest.raises(LATE):
        getattr(hurried, listing)()
    assert len(scripted.requests(method)) == 2


def test_bringing_examples_and_making_a_dataset_of_them_share_the_time(hurried, scripted):
    def upload(messages, context):
        # What arrives has all the time that it needs; what did not counts.
        if len(scripted.requests("UploadTensors")) == 1:
            scripted.release.wait(SLOW)
            raise errors.Unavailable("the service is restarted", retryable=True)
        for _ in messages:
            pass
        return pb.UploadTensorsResponse(name="uploads/u")

    described = from_torch(torch.zeros(10, 2))
    made = DatasetInfo(id="d", inputs=described, targets=None, num_examples=10, nbytes=80, created_at=1e9)
    scripted.answers["UploadTensors"] = upload
    scripted.answers["CreateDataset"] = lambda request, context: codec.encode_dataset(made)
    slow_down(scripted, "CreateDataset")
    with pytest.raises(LATE):
        hurried.upload_dataset(torch.zeros(10, INLINE_BYTES // 20))
    assert scripted.requests("CreateDataset")


def optimizer_state(names: list[str]) -> pb.GetOptimizerStateResponse:
    reply = pb.GetOptimizerStateResponse()
    codec.encode_value({"param_groups": ({"params": tuple(names), "lr": 0.1},)}, reply.state, "state")
    return reply


@pytest.fixture
def module_answers(scripted):
    """What modules and optimizers of `hosted` ask."""
    outputs = from_torch(torch.zeros(6, 2))
    retained = ForwardResult(outputs=outputs, step=0, retained="r", differentiable_outputs=(0,))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    scripted.answers |= {
        "Forward": lambda request, context: codec.encode_forward_result(retained),
        "Backward": lambda request, context: pb.BackwardResponse(),
        "GetGradients": lambda request, context: pb.GetGradientsResponse(),
        "SetGradients": lambda request, context: pb.SetGradientsResponse(),
        "GetOptimizerState": lambda request, context: optimizer_state(names),
        "Release": lambda request, context: pb.ReleaseResponse(),
    }


@pytest.mark.parametrize(
    ("call", "method"),
    [("forward_backward", "ForwardBackward"), ("backward", "Backward"), ("step", "OptimizerStep")],
)
def test_bringing_changed_gradients_and_the_call_that_needs_them_share_the_time(
    hurried, hosted, scripted, module_answers, call, method
):
    model = hurried.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(), example=batch())
    module, optimizer = model.as_module(), model.as_optimizer()
    loss = module(batch()[0]).sum()
    slow_down(scripted, "SetGradients", method)
    next(module.parameters()).grad = torch.ones(2, 3)
    calls = {"forward_backward": lambda: model.forward_backward(*batch()), "backward": loss.backward}
    with pytest.raises(LATE):
        calls.get(call, optimizer.step)()
    assert len(scripted.requests("SetGradients")) == len(scripted.requests(method)) == 1


def test_optimizer_that_catches_up_with_new_settings_does_so_in_the_time_of_its_step(
    hurried, hosted, scripted, module_answers
):
    model = hurried.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(), example=batch())
    optimizer = model.as_optimizer()
    scripted.answers["UpdateModel"] = hosted.get
    model.futures.update(lr=0.2).result(5)
    slow_down(scripted, "GetOptimizerState", "OptimizerStep")
    with pytest.raises(LATE):
        optimizer.step()
    assert scripted.requests("OptimizerStep")


def test_upload_stands_still_no_longer_than_its_call_has_time(scripted):
    rpc = Rpc(scripted.target, timeout=30.0)
    scripted.answers["UploadTensors"] = lambda messages, context: (
        scripted.release.wait(10) and pb.UploadTensorsResponse()
    )
    uploads = Uploads(rpc, Deadline(0.4))
    started = time.monotonic()
    with pytest.raises(errors.Unavailable, match=r"no bytes for 0\.4 s"):
        uploads.send_apart((from_torch(torch.zeros(INLINE_BYTES // 2)),))
    assert time.monotonic() - started < 0.4 + SLACK
    rpc.close()


def test_upload_that_moves_takes_its_time_and_the_request_has_its_own(scripted, rpc):
    def trickle(messages, context):
        # The sender does not see it move for some messages: so many are under way.
        for _ in messages:
            time.sleep(0.05)
        return pb.UploadTensorsResponse(name="uploads/u")

    scripted.answers["UploadTensors"] = trickle
    uploads = Uploads(rpc, Deadline(0.5))
    started = time.monotonic()
    uploads.send_apart((from_torch(torch.zeros(INLINE_BYTES)),))
    assert time.monotonic() - started > 0.5 and uploads.deadline.left > 0.4


def test_upload_that_goes_again_is_over_by_the_deadline_however_it_moves(scripted, rpc):
    uploads = Uploads(rpc)
    pause = 0.0

    def upload(messages, context):
        for _ in messages:
            time.sleep(pause)
        return pb.UploadTensorsResponse(name="uploads/u")

    scripted.answers["UploadTensors"] = upload
    uploads.send_apart((from_torch(torch.zeros(INLINE_BYTES // 2)),))
    pause = 0.1
    started = time.monotonic()
    with pytest.raises(errors.GradwireError):
        uploads.send_again(Deadline(0.5))
    assert time.monotonic() - started < 0.5 + SLACK


def test_clock_stands_while_the_client_works_by_itself():
    deadline = Deadline(5.0)
    time.sleep(0.02)
    assert deadline.left == 5.0
    with deadline.running(), deadline.running():
        time.sleep(0.02)
        assert 0 < deadline.left < 5.0 - 0.01
    left = deadline.left
    time.sleep(0.02)
    assert deadline.left == left < 5.0 - 0.01
    assert deadline.within(1.0).left == 1.0 and deadline.within(9.0).left == left


def test_call_behind_futures_has_its_whole_time_when_its_turn_comes(hurried, hosted, scripted):
    model = hurried.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(), example=batch())
    slow_down(scripted, "TrainStep")
    futures = [model.futures.train_step(*batch()) for _ in range(2)]
    assert model.train_step(*batch()).step == 4
    assert all(each.done() for each in futures)


def test_upload_through_memory_that_nobody_takes_leaves_half_of_the_time_to_grpc(scripted, silent_socket):
    scripted.answers["UploadTensors"] = lambda messages, context: (
        scripted.release.wait(10) and pb.UploadTensorsResponse()
    )
    rpc = Rpc(scripted.target, timeout=1.0)
    rpc.local.offer(silent_socket)
    uploads, tensor = Uploads(rpc), from_torch(torch.zeros(INLINE_BYTES // 2))
    started = time.monotonic()
    with pytest.raises(errors.Unavailable, match=r"no bytes for 0\.[345]\d* s"):
        uploads.send_apart((tensor,))
    assert 0.9 < time.monotonic() - started < 1.0 + SLACK and uploads.deadline.left <= 0
    rpc.close()


def test_download_stands_still_for_the_timeout_however_it_is_tried(scripted, silent_socket):
    scripted.answers["DownloadTensors"] = lambda request, context: scripted.release.wait(10) and iter(())
    rpc = Rpc(scripted.target, timeout=1.0)
    rpc.local.offer(silent_socket)
    started = time.monotonic()
    with pytest.raises(errors.Unavailable):
        receive(rpc, (TensorData("float32", (INLINE_BYTES,), Handle("downloads/d/tensors/0")),))
    assert scripted.requests("DownloadTensors") and 0.9 < time.monotonic() - started < 1.0 + SLACK / 2
    rpc.close()


def test_shared_memory_is_looked_for_when_a_reply_is_at_hand_and_no_longer_than_the_call_may_take(
    scripted, silent_socket, monkeypatch
):
    monkeypatch.setattr("gradwire.local_transport._PAUSE", 0.0)
    rpc = Rpc(scripted.target, timeout=1.0)
    rpc.local.offer(silent_socket)
    assert rpc.local.download("downloads/d", ()) is None and not rpc.local.is_connected
    scripted.answers["GetServerInfo"] = lambda request, context: scripted.release.wait(10)
    scripted.answers["ListModels"] = lambda request, context: pb.ListModelsResponse(next_page_token="more")
    inline_bytes(rpc)
    assert not scripted.requests("GetServerInfo")
    started = time.monotonic()
    assert rpc.call("ListModels", pb.ListModelsRequest()).next_page_token == "more"
    assert scripted.requests("GetServerInfo") and time.monotonic() - started < 1.0
    rpc.close()
