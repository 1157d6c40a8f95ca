"""Small calls of clients on the service's machine: commands and errors as by gRPC, and given up as there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server.local_peer import Peer

from gradwire_proto.local_wire import send_packet
from gradwire_proto.status import from_status
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2


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
        ("GetStateDict", 5.0, "call.method: expected one of ForwardBackward, OptimizerStep, TrainStep, ZeroGrad"),
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
    await local.until(lambda: local.service._admission.in_flight == 2)
    peer.socket.close()
    await local.until(lambda: local.service._admission.in_flight == 1)
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
    await local.until(lambda: not local.service._admission.in_flight)
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
