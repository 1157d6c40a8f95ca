"""Calls of clients on the service's machine: commands and errors as by gRPC, and given up as there."""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import Any

import pytest
from server.local_peer import Peer

from gradwire_proto.local_wire import CALL_BYTES, SEALS, has_seals, send_packet
from gradwire_proto.status import from_status
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2
from gradwire_proto.values import ForwardResult, GradientResult, TensorData


def called(request: Any, method: str = "TrainStep", timeout: float = 5.0) -> local_pb2.LocalRequest:
    call = local_pb2.LocalCall(method=method, request=request.SerializeToString(), timeout_seconds=timeout)
    return local_pb2.LocalRequest(call=call)


async def test_step_is_the_same_command_as_by_grpc(local: Any, peer: Peer, fakes: Any) -> None:
    request = local.train(b"a", request_id=fakes.request_id())
    reply, _ = await peer.ask(called(request))
    response = pb.TrainStepResponse.FromString(reply.response)
    assert response.result.step == 1
    assert await local.stub.TrainStep(request) == response
    assert (await peer.ask(called(request)))[0] == reply
    assert [call[0] for call in local.cluster.groups["m"].calls] == ["train_step"]


async def test_client_may_call_again_as_soon_as_it_is_answered(local: Any, peer: Peer, fakes: Any) -> None:
    for step in range(1, 31):
        reply, _ = await peer.ask(called(local.train(b"a", request_id=fakes.request_id())))
        assert pb.TrainStepResponse.FromString(reply.response).result.step == step


async def test_other_small_commands_can_be_called(local: Any, peer: Peer) -> None:
    backward = pb.ForwardBackwardRequest(name="models/m", batch=local.train(b"a").batch)
    named = {"ForwardBackward": backward, "OptimizerStep": pb.OptimizerStepRequest(name="models/m")}
    named["ZeroGrad"] = pb.ZeroGradRequest(name="models/m")
    for method, request in named.items():
        assert (await peer.ask(called(request, method)))[0].WhichOneof("kind") == "response"
    calls = local.cluster.groups["m"].calls
    assert [call[0] for call in calls] == ["forward_backward", "optimizer_step", "zero_grad"]


@pytest.mark.parametrize("method", ["TrainStep", "ZeroGrad"])
async def test_error_is_that_of_grpc(local: Any, peer: Peer, fakes: Any, method: str) -> None:
    request = pb.ZeroGradRequest(name="models/none", request_id=fakes.request_id())
    if method == "TrainStep":
        request = local.train(b"a", model_id="none", request_id=fakes.request_id())
    reply, _ = await peer.ask(called(request, method))
    found, expected = from_status(reply.error), await local.error(getattr(local.stub, method)(request))
    assert found.attributes() == expected.attributes() and found.reason == "MODEL_NOT_FOUND"


async def test_what_is_no_message_is_an_error_and_the_connection_goes_on(local: Any, peer: Peer) -> None:
    for method in ("TrainStep", "ZeroGrad"):
        call = local_pb2.LocalCall(method=method, request=b"\xff\xff", timeout_seconds=5)
        reply, _ = await peer.ask(local_pb2.LocalRequest(call=call))
        assert from_status(reply.error).reason == "MALFORMED_MESSAGE"
    assert (await peer.ask(called(local.train(b"a"))))[0].response


@pytest.mark.parametrize(
    ("method", "timeout", "words"),
    [
        (
            "GetStateDict",
            5.0,
            "call.method: expected one of ComputeGradients, Forward, ForwardBackward",
        ),
        ("TrainStep", 0.0, "call.timeout_seconds: expected more than 0 seconds, got 0"),
        ("TrainStep", float("inf"), "call.timeout_seconds"),
        ("TrainStep", float("nan"), "call.timeout_seconds"),
    ],
)
async def test_call_that_is_none_is_refused(local: Any, peer: Peer, method: str, timeout: float, words: str) -> None:
    reply, _ = await peer.ask(called(local.train(b"a"), method, timeout))
    assert words in reply.refusal.message
    assert not local.cluster.groups["m"].calls


async def test_client_that_hangs_up_before_its_turn_wants_no_step(local: Any, peer: Peer) -> None:
    workers = local.cluster.groups["m"]
    workers.gate.clear()
    first = asyncio.ensure_future(local.stub.TrainStep(local.train(b"a")))
    await local.until(lambda: workers.busy)
    send_packet(peer.socket, called(local.train(b"b")))
    await local.until(lambda: local.tenant.admission.in_flight == 2)
    peer.socket.close()
    await local.until(lambda: local.tenant.admission.in_flight == 1)
    workers.gate.set()
    await first
    assert (await local.stub.TrainStep(local.train(b"c"))).result.step == 2
    assert [call[1][:1] for call in workers.calls] == [b"a", b"c"]


async def test_client_that_hangs_up_in_its_turn_has_its_step(local: Any, peer: Peer) -> None:
    workers = local.cluster.groups["m"]
    workers.gate.clear()
    send_packet(peer.socket, called(local.train(b"a")))
    await local.until(lambda: workers.busy)
    peer.socket.close()
    await local.until(lambda: not local.tenant.admission.in_flight)
    workers.gate.set()
    assert (await local.stub.TrainStep(local.train(b"b"))).result.step == 2


async def test_call_whose_time_is_over_in_the_queue_is_not_begun(local: Any, peer: Peer) -> None:
    workers = local.cluster.groups["m"]
    workers.gate.clear()
    first = asyncio.ensure_future(local.stub.TrainStep(local.train(b"a")))
    await local.until(lambda: workers.busy)
    asking = asyncio.ensure_future(peer.ask(called(local.train(b"b"), timeout=0.1)))
    await asyncio.sleep(0.2)
    workers.gate.set()
    await first
    error = from_status((await asking)[0].error)
    assert type(error).__name__ == "DeadlineExceeded" and error.outcome == "not_applied"


async def test_client_that_does_not_wait_for_its_answer_is_cut_off(local: Any, peer: Peer) -> None:
    local.cluster.groups["m"].gate.clear()
    for _ in range(2):
        send_packet(peer.socket, called(local.train(b"a")))
    assert await peer.is_cut_off()
    local.cluster.groups["m"].gate.set()


async def test_service_that_drains_ends_calls_that_came_before_and_takes_no_more(local: Any, peer: Peer) -> None:
    workers = local.cluster.groups["m"]
    workers.gate.clear()
    asking = asyncio.ensure_future(peer.ask(called(local.train(b"a"))))
    await local.until(lambda: workers.busy)
    drain = asyncio.ensure_future(local.service.drain())
    await asyncio.sleep(0.05)
    late = Peer(local.service._local.path)
    assert from_status((await late.ask(called(local.train(b"b"))))[0].error).reason == "DRAINING"
    late.socket.close()
    assert not drain.done()
    workers.gate.set()
    assert (await asking)[0].response
    await asyncio.wait_for(drain, 5)


# --- requests and responses that do not fit into a packet -----------------------------------------------------------


def memory_file(content: bytes, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    file = os.memfd_create("request", os.MFD_ALLOW_SEALING)
    os.write(file, content)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def in_a_file(nbytes: int, method: str = "TrainStep") -> local_pb2.LocalRequest:
    call = local_pb2.LocalCall(method=method, request_bytes=nbytes, timeout_seconds=5)
    return local_pb2.LocalRequest(call=call)


async def test_request_in_a_file_is_the_same_command_whatever_becomes_of_the_file(
    local: Any, peer: Peer, fakes: Any
) -> None:
    request = local.train(b"a", request_id=fakes.request_id())
    raw = request.SerializeToString()
    workers = local.cluster.groups["m"]
    workers.gate.clear()
    file = memory_file(raw + b"of an earlier one")
    asking = asyncio.ensure_future(peer.ask(in_a_file(len(raw)), file))
    await local.until(lambda: workers.busy)
    os.pwrite(file, bytes(len(raw)), 0)
    workers.gate.set()
    response = pb.TrainStepResponse.FromString((await asking)[0].response)
    assert await local.stub.TrainStep(request) == response and response.result.step == 1
    assert [call[1][:1] for call in workers.calls] == [b"a"]
    # And it serves the next.
    raw = local.train(b"b").SerializeToString()
    os.pwrite(file, raw, 0)
    assert (await peer.ask(in_a_file(len(raw)), file))[0].response
    os.close(file)


async def test_file_that_holds_no_request_is_refused_and_the_connection_goes_on(
    local: Any, peer: Peer, open_files: Any
) -> None:
    raw = local.train(b"a").SerializeToString()
    reading, writing = os.pipe()
    good, open_to_shrinking = memory_file(raw), memory_file(raw, 0)
    before = open_files()
    refused: list[tuple[int, tuple[int, ...]]] = [
        (len(raw), ()),
        (len(raw), (good, good)),
        (len(raw), (open_to_shrinking,)),
        # Nobody will ever write to it.
        (len(raw), (reading,)),
        (len(raw) + 1, (good,)),
        (CALL_BYTES + 1, (good,)),
        (-1, (good,)),
    ]
    for nbytes, files in refused:
        reply, _ = await asyncio.wait_for(peer.ask(in_a_file(nbytes), *files), 5)
        assert reply.refusal.reason == "REQUEST_FILE_INVALID", (nbytes, files)
    both = in_a_file(len(raw))
    both.call.request = raw
    assert (await peer.ask(both, good))[0].refusal.reason == "REQUEST_FILE_INVALID"
    assert not local.cluster.groups["m"].calls
    assert (await peer.ask(in_a_file(len(raw)), good))[0].response
    assert open_files() == before
    for file in (reading, writing, good, open_to_shrinking):
        os.close(file)


async def test_response_that_is_too_big_for_a_packet_comes_in_a_sealed_file(local: Any, peer: Peer) -> None:
    local.cluster.groups["m"].result = ForwardResult(outputs=TensorData("uint8", (100_000,), b"x" * 100_000), step=3)
    request = pb.ForwardRequest(name="models/m", inputs=local.train().batch.inputs)
    reply, (file,) = await peer.ask(called(request, "Forward"))
    assert reply.WhichOneof("kind") == "response" and not reply.response
    response = pb.ForwardResponse.FromString(os.pread(file, reply.response_bytes, 0))
    assert response.step == 3 and response.outputs.tensor.data == b"x" * 100_000
    assert has_seals(file, SEALS)
    os.close(file)


async def test_tensors_that_would_be_downloaded_come_along(local: Any, peer: Peer, open_files: Any) -> None:
    tensors = {"w": TensorData("uint8", (7,), b"content"), "v": TensorData("uint8", (4,), b"more")}
    local.cluster.groups["m"].result = GradientResult(loss=0.5, step=0, num_examples=1, gradients=tensors)
    request = pb.ComputeGradientsRequest(name="models/m", max_inline_bytes=1, batch=local.train().batch)
    before = open_files()
    reply, (file,) = await peer.ask(called(request, "ComputeGradients"))
    response = pb.ComputeGradientsResponse.FromString(reply.response)
    handles = [each.tensor.handle for each in response.gradients]
    assert handles == [f"{reply.brought.name}/tensors/{index}" for index in range(2)]
    found = [os.pread(file, place.nbytes, place.offset) for place in reply.brought.places]
    assert found == [b"content", b"more"]
    # They are not held for somebody to ask.
    assert (await peer.download(reply.brought.name))[0].refusal.reason == "DOWNLOAD_NOT_FOUND"
    os.close(file)
    local.tenant.tensors.downloads._lent._sweep(idle=0.0)
    assert not local.files and open_files() == before


async def test_tensors_in_more_files_than_a_packet_takes_are_to_be_asked_for(
    local: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwire_server.local.local_connection.MOST_FILES", 1)
    tensors = {"w": TensorData("uint8", (7,), b"content")}
    local.cluster.groups["m"].result = GradientResult(loss=0.5, step=0, num_examples=1, gradients=tensors)
    request = pb.ComputeGradientsRequest(name="models/m", max_inline_bytes=1, batch=local.train().batch)
    reply, files = await peer.ask(called(request, "ComputeGradients"))
    assert not files and not reply.HasField("brought")
    handle = pb.ComputeGradientsResponse.FromString(reply.response).gradients[0].tensor.handle
    assert await local.download(handle.rpartition("/tensors/")[0]) == b"content"
