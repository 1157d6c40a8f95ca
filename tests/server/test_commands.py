"""Commands: in order, once for each request id, and whole or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from gradwire_proto.errors import FailedPrecondition, InvalidArgument, RankLost, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2


def values(workers: Any) -> list[bytes]:
    return [call[1].rstrip(b"\0") for call in workers.calls if call[0] == "train_step"]


async def test_commands_run_in_the_order_in_which_they_came(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    calls = []
    for number in range(1, 21):
        calls.append(asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(bytes([number])))))
        await asyncio.sleep(0.005)
    workers.gate.set()
    replies = await asyncio.gather(*calls)
    assert values(workers) == [bytes([number]) for number in range(1, 21)]
    assert [call[2] for call in workers.calls] == list(range(1, 21))
    assert [reply.result.step for reply in replies] == list(range(1, 21))


async def test_repeated_request_id_returns_first_reply(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = frontend.train(request_id=fakes.request_id())
    first = await frontend.stub.TrainStep(request)
    await frontend.stub.TrainStep(frontend.train())
    assert await frontend.stub.TrainStep(request) == first
    assert len(workers.calls) == 2


async def test_duplicate_joins_the_command_that_runs(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    request = frontend.train(request_id=fakes.request_id())
    calls = [asyncio.ensure_future(frontend.stub.TrainStep(request)) for _ in range(3)]
    await frontend.until(lambda: workers.busy)
    await asyncio.sleep(0.05)
    workers.gate.set()
    replies = await asyncio.gather(*calls)
    assert len(workers.calls) == 1 and replies[0] == replies[1] == replies[2]


async def test_request_id_with_another_body_is_refused(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request_id = fakes.request_id()
    await frontend.stub.TrainStep(frontend.train(request_id=request_id))
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"other", request_id=request_id)))
    assert (error.reason, error.field, error.request_id) == ("REQUEST_ID_REUSED", "request_id", request_id)
    other_method = pb.ZeroGradRequest(name="models/m", request_id=request_id)
    assert (await frontend.error(frontend.stub.ZeroGrad(other_method))).reason == "REQUEST_ID_REUSED"
    assert len(workers.calls) == 1


async def test_stored_error_is_the_reply_of_a_repeat(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.error = InvalidArgument("expected [0, 10), got 11", field="batch.targets", reason="TARGET_OUT_OF_RANGE")
    request = frontend.train(request_id=fakes.request_id())
    first = await frontend.error(frontend.stub.TrainStep(request))
    workers.error = None
    second = await frontend.error(frontend.stub.TrainStep(request))
    assert (first.reason, first.field) == (second.reason, second.field) == ("TARGET_OUT_OF_RANGE", "batch.targets")
    assert len(workers.calls) == 1


async def test_repeat_of_a_step_is_not_applied_again_however_many_came_after_it(start: Any, fakes: Any) -> None:
    async with start(stored_replies=4, requests_per_model=4) as frontend:
        workers = await frontend.create()
        requests = [frontend.train(request_id=fakes.request_id()) for _ in range(6)]
        for request in requests:
            await frontend.stub.TrainStep(request)
        await frontend.stub.TrainStep(requests[-1])
        error = await frontend.error(frontend.stub.TrainStep(requests[0]))
        assert (error.reason, error.outcome) == ("REPLY_FORGOTTEN", "applied")
        command = pb.GetCommandRequest(name=f"models/m/commands/{requests[0].request_id}")
        assert (await frontend.stub.GetCommand(command)).state == model_pb2.COMMAND_STATE_APPLIED
        assert len(workers.calls) == 6


async def test_malformed_request_id_is_refused(frontend: Any) -> None:
    await frontend.create()
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(request_id="one")))
    assert (error.reason, error.field) == ("REQUEST_ID_INVALID", "request_id")


async def test_command_cancelled_in_the_queue_is_not_applied(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"first")))
    await frontend.until(lambda: workers.busy)
    request = frontend.train(b"second", request_id=fakes.request_id())
    queued = frontend.stub.TrainStep(request)
    await asyncio.sleep(0.05)
    queued.cancel()
    await asyncio.sleep(0.05)
    workers.gate.set()
    await running
    assert values(workers) == [b"first"]
    name = f"models/m/commands/{request.request_id}"
    command = await frontend.stub.GetCommand(pb.GetCommandRequest(name=name, wait=True))
    assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED
    await frontend.stub.TrainStep(request)
    assert values(workers) == [b"first", b"second"]


async def test_command_whose_deadline_passes_in_the_queue_is_not_applied(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"first")))
    await frontend.until(lambda: workers.busy)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await frontend.stub.TrainStep(frontend.train(b"second"), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.1)
    workers.gate.set()
    await running
    await frontend.stub.TrainStep(frontend.train(b"third"))
    assert values(workers) == [b"first", b"third"]


async def test_running_command_ends_without_its_caller(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    request = frontend.train(request_id=fakes.request_id())
    call = frontend.stub.TrainStep(request)
    await frontend.until(lambda: workers.busy)
    call.cancel()
    name = f"models/m/commands/{request.request_id}"
    running = await frontend.stub.GetCommand(pb.GetCommandRequest(name=name))
    assert running.state == model_pb2.COMMAND_STATE_RUNNING
    waiting = asyncio.ensure_future(frontend.stub.GetCommand(pb.GetCommandRequest(name=name, wait=True)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    workers.gate.set()
    assert (await waiting).state == model_pb2.COMMAND_STATE_APPLIED
    assert (await frontend.stub.TrainStep(request)).result.step == 1
    assert len(workers.calls) == 1


async def test_duplicate_keeps_a_queued_command_whose_first_caller_left(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"first")))
    await frontend.until(lambda: workers.busy)
    request = frontend.train(b"second", request_id=fakes.request_id())
    first = frontend.stub.TrainStep(request, timeout=0.1)
    second = asyncio.ensure_future(frontend.stub.TrainStep(request))
    assert (await frontend.error(first)).reason == "DEADLINE_EXCEEDED"
    workers.gate.set()
    assert (await second).result.step == 2
    await running


async def test_request_that_was_declared_not_applied_is_not_when_it_arrives_late(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = frontend.train(b"late", request_id=fakes.request_id())
    command = pb.GetCommandRequest(name=f"models/m/commands/{request.request_id.upper()}")
    assert (await frontend.error(frontend.stub.GetCommand(command))).reason == "COMMAND_NOT_FOUND"
    error = await frontend.error(frontend.stub.TrainStep(request))
    assert (error.reason, error.outcome, error.retryable) == ("DECLARED_NOT_APPLIED", "not_applied", False)
    assert isinstance(error, FailedPrecondition) and not values(workers)
    request.request_id = fakes.request_id()
    await frontend.stub.TrainStep(request)
    assert values(workers) == [b"late"]


async def test_unknown_commands_and_models_are_told_apart(frontend: Any, fakes: Any) -> None:
    await frontend.create()

    async def reason(name: str) -> str:
        return (await frontend.error(frontend.stub.GetCommand(pb.GetCommandRequest(name=name)))).reason

    assert await reason(f"models/m/commands/{fakes.request_id()}") == "COMMAND_NOT_FOUND"
    assert await reason(f"models/other/commands/{fakes.request_id()}") == "MODEL_NOT_FOUND"
    assert await reason("models/m/commands/x") == "REQUEST_ID_INVALID"
    assert await reason("models/m") == "NAME_INVALID"


async def test_requests_per_model_is_a_limit_with_a_name(start: Any) -> None:
    async with start(requests_per_model=3) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        calls = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(3)]
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.05)
        error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
        assert error.reason == "QUEUE_FULL" and error.retryable and error.retry_after
        assert "requests_per_model" in error.message and error.outcome == "not_applied"
        workers.gate.set()
        await asyncio.gather(*calls)
        await frontend.stub.TrainStep(frontend.train())


async def test_requests_in_flight_is_a_limit_with_a_name(start: Any) -> None:
    async with start(requests_in_flight=2) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        calls = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(2)]
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.05)
        error = await frontend.error(frontend.stub.GetServerInfo(pb.GetServerInfoRequest()))
        assert error.reason == "TOO_MANY_REQUESTS" and "requests_in_flight" in error.message and error.retry_after
        workers.gate.set()
        await asyncio.gather(*calls)
        await frontend.stub.GetServerInfo(pb.GetServerInfoRequest())


async def test_failed_command_is_not_numbered(frontend: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.TrainStep(frontend.train())
    workers.error = InvalidArgument("no")
    await frontend.error(frontend.stub.TrainStep(frontend.train()))
    workers.error = None
    await frontend.stub.TrainStep(frontend.train())
    assert [call[2] for call in workers.calls] == [1, 2, 2]


async def test_lost_rank_fails_a_model_that_outlives_nothing_and_no_other(frontend: Any) -> None:
    workers = await frontend.create(durability="none")
    await frontend.create("other")
    workers.error = RankLost("rank 1 died", outcome="unknown")
    error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
    assert type(error) is RankLost and error.outcome == "unknown"
    model = await frontend.model()
    assert model.state == model_pb2.MODEL_STATE_FAILED and "rank 1 died" in model.last_error.message
    error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
    assert error.reason == "MODEL_FAILED" and "rank 1 died" in error.message and len(workers.calls) == 1
    await frontend.stub.TrainStep(frontend.train(model_id="other"))
    await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
    assert workers.closed and not any(workers.closed)


async def test_rank_that_dies_while_idle_fails_a_model_that_outlives_nothing(frontend: Any) -> None:
    workers = await frontend.create(durability="none")
    workers.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: workers.closed)
    await asyncio.sleep(0.01)
    assert (await frontend.model()).state == model_pb2.MODEL_STATE_FAILED


async def test_defect_tells_its_request_id_and_nothing_else(frontend: Any, fakes: Any, caplog: Any) -> None:
    workers = await frontend.create()
    workers.error = RuntimeError("secret /root/path")
    request = frontend.train(request_id=fakes.request_id())
    error = await frontend.error(frontend.stub.TrainStep(request))
    assert type(error).__name__ == "InternalError" and error.request_id == request.request_id
    assert "secret" not in str(error)
    assert "secret /root/path" in caplog.text and request.request_id in caplog.text
    assert "secret" not in str(await frontend.model())


async def test_timing_tells_the_wait_in_the_queue(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    calls = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))]
    await frontend.until(lambda: workers.busy)
    calls.append(asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())))
    await asyncio.sleep(0.2)
    workers.gate.set()
    times = [reply.result.timing for reply in await asyncio.gather(*calls)]
    assert sorted(time.queue > 0.05 for time in times) == [False, True]
    assert min(time.total for time in times) > 0.05


async def test_reads_take_turns_with_commands(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    step = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))
    await frontend.until(lambda: workers.busy)
    read = asyncio.ensure_future(frontend.stub.GetStateDict(pb.GetStateDictRequest(name="models/m")))
    await asyncio.sleep(0.05)
    assert not read.done()
    workers.gate.set()
    await step
    assert (await read).step == 1


async def test_error_after_a_command_was_applied_counts_as_applied(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = frontend.train(request_id=fakes.request_id())
    workers.error = ResourceExhausted("the answer did not fit", reason="REPLY_TOO_LARGE", outcome="applied")
    error = await frontend.error(frontend.stub.TrainStep(request))
    assert error.outcome == "applied"
    workers.error = None
    command = pb.GetCommandRequest(name=f"models/m/commands/{request.request_id}")
    assert (await frontend.stub.GetCommand(command)).state == model_pb2.COMMAND_STATE_APPLIED
    assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "applied"
    await frontend.stub.TrainStep(frontend.train())
    assert [call[2] for call in workers.calls] == [1, 2], (
        "the next command has a number, and random numbers, of its own"
    )
