"""Streams of training steps: in order, each once, together where they can be, and never more of them than may wait."""

from __future__ import annotations

import asyncio
import errno
import threading
import tracemalloc
from typing import Any

import grpc
import pytest
from grpc.aio import EOF  # pyright: ignore[reportAttributeAccessIssue]

from gradwire_proto import codec
from gradwire_proto.errors import RankLost, Unavailable
from gradwire_proto.status import from_rpc_error, from_status
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Batch, Limits, TensorData
from gradwire_server.fingerprints import fingerprint
from gradwire_server.step_requests import StepRequests
from gradwire_server.storage.segment_writer import SegmentWriter
from gradwire_server.stored_replies import EndedCommand


def values(workers: Any) -> list[bytes]:
    return [call[1].rstrip(b"\0") for call in workers.calls if call[0] == "train_step"]


def numbers(workers: Any) -> list[int]:
    return [call[2] for call in workers.calls if call[0] == "train_step"]


def steps(frontend: Any, fakes: Any, *values: bytes) -> list[pb.TrainStepRequest]:
    return [frontend.train(value, request_id=fakes.request_id()) for value in values]


class Stream:
    """A call of TrainSteps, message by message."""

    def __init__(self, frontend: Any) -> None:
        self.call = frontend.stub.TrainSteps()

    async def send(self, *requests: pb.TrainStepRequest) -> None:
        await self.call.write(pb.TrainStepsRequest(steps=requests))

    async def outcomes(self, count: int) -> list[Any]:
        """So many of them: results, and errors as the SDK raises them."""
        found: list[Any] = []
        async with asyncio.timeout(5):
            while len(found) < count:
                response = await self.call.read()
                assert response is not EOF, f"ended after {found}"
                for each in response.outcomes:
                    found.append(each.result if each.HasField("result") else from_status(each.error))
        return found

    async def end(self) -> None:
        await self.call.done_writing()
        assert await self.call.read() is EOF


async def error_of(stream: Stream) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        assert await asyncio.wait_for(stream.call.read(), 5) is EOF
    return from_rpc_error(caught.value, command=False)


async def held(frontend: Any, workers: Any) -> asyncio.Future[Any]:
    """A step that is in the ranks, and stays there until the gate is opened."""
    workers.gate.clear()
    first = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"held")))
    await frontend.until(lambda: workers.busy)
    return first


async def test_steps_that_wait_go_to_the_ranks_together_and_are_answered_in_order(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    first = await held(frontend, workers)
    stream = Stream(frontend)
    wanted = [b"a", b"b", b"c", b"d"]
    requests = steps(frontend, fakes, *wanted)
    await stream.send(*requests[:1])
    await stream.send(*requests[1:])
    await asyncio.sleep(0.05)
    workers.gate.set()
    results = await stream.outcomes(4)
    await first
    await stream.end()
    assert [result.step for result in results] == [2, 3, 4, 5]
    assert values(workers) == [b"held", *wanted] and numbers(workers) == [1, 2, 3, 4, 5]
    assert workers.dispatches == [1, 4]
    # A step of a stream is the same command as one that comes alone.
    assert [(await frontend.stub.TrainStep(request)).result for request in requests] == results
    assert len(workers.calls) == 5


async def test_steps_that_come_while_ranks_are_at_others_are_sent_behind_them(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.most_ahead = 1
    first = await held(frontend, workers)
    stream = Stream(frontend)
    wanted = [b"a", b"b", b"no", b"d"]
    await stream.send(*steps(frontend, fakes, *wanted))
    # All of them together, although they are cut out of the message one by one.
    await frontend.until(lambda: workers.dispatches == [1, 4])
    assert values(workers) == [b"held"]
    workers.refused = b"no"
    other = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"other")))
    await asyncio.sleep(0.05)
    workers.gate.set()
    *applied, refused, behind = await stream.outcomes(4)
    assert [result.step for result in applied] == [2, 3]
    assert (refused.reason, behind.reason) == ("SHAPE_MISMATCH", "STEP_BEFORE_REFUSED")
    # What is no part of that stream runs, with the number that is next.
    assert ((await first).result.step, (await other).result.step) == (1, 4)
    assert values(workers) == [b"held", b"a", b"b", b"other"] and numbers(workers) == [1, 2, 3, 4]


async def test_a_model_shows_no_step_of_a_stream_before_it_is_durable(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    workers, may_sync, sync = await frontend.create(durability="disk"), threading.Event(), SegmentWriter.sync

    def slow(self: SegmentWriter) -> None:
        assert may_sync.wait(5)
        sync(self)

    monkeypatch.setattr(SegmentWriter, "sync", slow)
    stream = Stream(frontend)
    await stream.send(*steps(frontend, fakes, b"a", b"b"))
    await frontend.until(lambda: values(workers) == [b"a", b"b"])
    assert workers.dispatches == [2]
    assert (await frontend.stub.GetModel(pb.GetModelRequest(name="models/m"))).step == 0
    may_sync.set()
    await stream.outcomes(2)
    await stream.end()
    assert (await frontend.stub.GetModel(pb.GetModelRequest(name="models/m"))).step == 2


async def test_requests_between_steps_keep_their_place(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    first = await held(frontend, workers)
    stream = Stream(frontend)
    await stream.send(*steps(frontend, fakes, b"a", b"b"))
    await asyncio.sleep(0.05)
    other = asyncio.ensure_future(frontend.stub.ZeroGrad(pb.ZeroGradRequest(name="models/m")))
    await asyncio.sleep(0.05)
    await stream.send(*steps(frontend, fakes, b"c"))
    await asyncio.sleep(0.05)
    workers.gate.set()
    await stream.outcomes(3)
    await asyncio.gather(first, other)
    assert [call[0] for call in workers.calls] == ["train_step", "train_step", "train_step", "zero_grad", "train_step"]


async def test_message_of_too_many_steps_ends_its_stream(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    stream = Stream(frontend)
    await stream.send(*[pb.TrainStepRequest()] * 4097)
    error = await error_of(stream)
    assert (error.reason, error.field) == ("MESSAGE_TOO_LARGE", "steps") and "at most 4096 steps" in str(error)
    assert not workers.calls


async def test_message_of_several_steps_has_a_bound_in_bytes_and_that_of_one_has_its_own(
    frontend: Any, fakes: Any
) -> None:
    workers = await frontend.create()
    first, second = steps(frontend, fakes, b"a", b"b")
    first.batch.Clear()
    codec.encode_batch(Batch(TensorData("uint8", (8 << 20,), bytes(8 << 20))), first.batch)
    stream = Stream(frontend)
    await stream.send(first)
    await stream.outcomes(1)
    await stream.send(first, second)
    error = await error_of(stream)
    assert (error.reason, error.field) == ("MESSAGE_TOO_LARGE", "steps") and "at most 8388608 bytes" in str(error)
    assert len(workers.calls) == 1


async def test_a_client_that_does_not_take_its_answers_does_not_keep_its_place(start: Any, fakes: Any) -> None:
    async with start(stall_seconds=0.3) as frontend:
        workers = await frontend.create()
        window = [
            ("grpc.http2.lookahead_bytes", 1024),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        async with grpc.aio.insecure_channel(frontend.target, options=window) as channel:
            call = channel.stream_stream("/gradwire.v1.GradientService/TrainSteps")()
            requests = steps(frontend, fakes, *[b"a"] * 1000)
            await call.write(pb.TrainStepsRequest(steps=requests).SerializeToString())
            await frontend.until(lambda: workers.step)
            await frontend.until(lambda: not frontend.tenant.admission.in_flight)
            assert workers.step < 500
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [response async for response in call]
            assert from_rpc_error(caught.value, command=False).reason == "STREAM_STALLED"


async def test_steps_behind_a_refused_one_are_not_applied_and_told_so(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.refused = b"bad"
    stream, other = Stream(frontend), Stream(frontend)
    requests = steps(frontend, fakes, b"a", b"bad", b"b", b"c")
    first = await held(frontend, workers)
    await stream.send(*requests[:3])
    await asyncio.sleep(0.05)
    await other.send(*steps(frontend, fakes, b"x", b"y"))
    await asyncio.sleep(0.05)
    workers.gate.set()
    applied, refused, behind = await stream.outcomes(3)
    await stream.send(requests[3])
    (later,) = await stream.outcomes(1)
    await stream.end()
    assert applied.step == 2
    assert (refused.reason, refused.field, refused.outcome) == ("SHAPE_MISMATCH", "batch.inputs", "not_applied")
    assert (behind.reason, behind.outcome) == (later.reason, later.outcome) == ("STEP_BEFORE_REFUSED", "not_applied")
    # Another client's are not behind it.
    assert [result.step for result in await other.outcomes(2)] == [3, 4]
    await first
    assert values(workers) == [b"held", b"a", b"x", b"y"] and numbers(workers) == [1, 2, 3, 4]
    name = f"models/m/commands/{requests[2].request_id}"
    command = await frontend.stub.GetCommand(pb.GetCommandRequest(name=name, wait=True))
    assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED
    # It was only in the wrong company.
    assert (await frontend.stub.TrainStep(requests[2])).result.step == 5


async def test_a_step_that_cannot_be_read_is_refused_in_its_place(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.create("other")
    good, bad, behind = steps(frontend, fakes, b"a", b"b", b"c")
    bad.MergeFromString(b"\xfa\x3f\x01\x00")
    stream = Stream(frontend)
    await stream.send(good, bad, behind)
    result, refused, after = await stream.outcomes(3)
    assert (result.step, refused.reason, after.reason) == (1, "UNKNOWN_FIELD", "STEP_BEFORE_REFUSED")
    elsewhere = frontend.train(b"d", model_id="other", request_id=fakes.request_id())
    stream = Stream(frontend)
    await stream.send(*steps(frontend, fakes, b"b"), elsewhere)
    assert [getattr(each, "reason", None) for each in await stream.outcomes(2)] == [None, "MODEL_DIFFERS"]
    assert values(workers) == [b"a", b"b"]


@pytest.mark.parametrize(("size", "count"), [(1 << 20, 16), (7 << 10, 250)])
def test_little_is_kept_of_requests_with_much_besides_their_tensors(fakes: Any, size: int, count: int) -> None:
    requests = StepRequests(Limits())

    def read(number: int) -> Any:
        batch = Batch((fakes.two_floats(), str(number).ljust(size)))
        request = pb.TrainStepRequest(name="models/m", request_id=fakes.request_id())
        codec.encode_batch(batch, request.batch)
        return requests.read(request.SerializeToString(), arrived=0.0).step

    read(0)
    tracemalloc.start()
    try:
        for number in range(count):
            read(number)
        assert tracemalloc.get_traced_memory()[0] < 2 << 20
    finally:
        tracemalloc.stop()


async def test_a_step_with_much_besides_its_tensors_is_applied_like_any_other(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    requests = steps(frontend, fakes, b"a", b"b", b"c")
    requests[1].batch.Clear()
    codec.encode_batch(Batch(fakes.two_floats(b"b".ljust(8, b"\0")), "x" * (1 << 14)), requests[1].batch)
    stream = Stream(frontend)
    await stream.send(*requests)
    assert [result.step for result in await stream.outcomes(3)] == [1, 2, 3]
    assert values(workers) == [b"a", b"b", b"c"] and numbers(workers) == [1, 2, 3]


@pytest.mark.parametrize(("message", "reason"), [(b"\x0a\x05ab", "MALFORMED_MESSAGE"), (b"\x18\x01", "UNKNOWN_FIELD")])
async def test_a_message_that_is_none_ends_the_stream(frontend: Any, message: bytes, reason: str) -> None:
    call = frontend.channel.stream_stream("/gradwire.v1.GradientService/TrainSteps")()
    await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value, command=False).reason == reason


async def test_a_stream_that_is_cut_leaves_what_was_not_begun(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    first = await held(frontend, workers)
    cut, again = Stream(frontend), Stream(frontend)
    requests = steps(frontend, fakes, b"a", b"b", b"c")
    await cut.send(*requests)
    await asyncio.sleep(0.05)
    # The repeat of the first is there before the service hears that its stream was cut; those of the others are not.
    await again.send(requests[0])
    await asyncio.sleep(0.05)
    cut.call.cancel()
    await asyncio.sleep(0.05)
    await again.send(*requests[1:])
    await asyncio.sleep(0.05)
    workers.gate.set()
    await first
    assert [result.step for result in await again.outcomes(3)] == [2, 3, 4]
    assert values(workers) == [b"held", b"a", b"b", b"c"]


async def test_steps_behind_a_repeat_of_a_refused_one_are_not_applied(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.refused = b"bad"
    bad, behind = steps(frontend, fakes, b"bad", b"b")
    first = await held(frontend, workers)
    unary = frontend.stub.TrainStep(bad)
    await asyncio.sleep(0.05)
    stream = Stream(frontend)
    await stream.send(bad, behind)
    await asyncio.sleep(0.05)
    workers.gate.set()
    await first
    assert (await frontend.error(unary)).reason == "SHAPE_MISMATCH"
    assert [each.reason for each in await stream.outcomes(2)] == ["SHAPE_MISMATCH", "STEP_BEFORE_REFUSED"]
    # Nor later, when its error is what is stored of it.
    stream = Stream(frontend)
    await stream.send(bad, behind)
    assert [each.reason for each in await stream.outcomes(2)] == ["SHAPE_MISMATCH", "STEP_BEFORE_REFUSED"]
    assert values(workers) == [b"held"]


async def test_steps_behind_one_whose_reply_is_not_known_are_not_applied(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    known, behind = steps(frontend, fakes, b"a", b"b")
    log = frontend.tenant._models._hosted["m"].life.commands.log
    body = fingerprint("TrainStep", known.SerializeToString())
    log.restore(known.request_id, body, EndedCommand(1, "TrainStep", None))
    stream = Stream(frontend)
    await stream.send(known, behind)
    forgotten, after = await stream.outcomes(2)
    assert (forgotten.reason, forgotten.outcome) == ("REPLY_FORGOTTEN", "applied")
    assert (after.reason, after.outcome) == ("STEP_BEFORE_REFUSED", "not_applied")
    assert not values(workers)


@pytest.mark.parametrize("durability", ["process", "disk"])
async def test_steps_come_back_with_the_journal_and_their_repeats_are_answered(
    start: Any, fakes: Any, durability: str
) -> None:
    async with start() as frontend:
        await frontend.create(durability=durability)
        requests = steps(frontend, fakes, b"a", b"b", b"c")
        stream = Stream(frontend)
        await stream.send(*requests)
        results = await stream.outcomes(3)
    async with start() as frontend:
        stream = Stream(frontend)
        await stream.send(*requests, *steps(frontend, fakes, b"d"))
        again = await stream.outcomes(4)
        assert again[:3] == results and again[3].step == 4
        workers = frontend.cluster.groups["m"]
        assert values(workers) == [b"a", b"b", b"c", b"d"] and numbers(workers) == [1, 2, 3, 4]


async def test_steps_whose_ranks_are_lost_go_on_and_the_one_that_kills_them_is_refused(
    frontend: Any, fakes: Any
) -> None:
    await frontend.create()
    frontend.cluster.deadly = b"deadly"
    requests = steps(frontend, fakes, b"a", b"deadly", b"b")
    stream = Stream(frontend)
    await stream.send(*requests)
    applied, refused, behind = await stream.outcomes(3)
    assert (applied.step, refused.reason, behind.reason) == (1, "COMMAND_KILLS_RANKS", "STEP_BEFORE_REFUSED")
    stream = Stream(frontend)
    await stream.send(*requests[:1], *requests[2:])
    assert [result.step for result in await stream.outcomes(2)] == [1, 2]
    # Once in company, and twice alone.
    assert len(frontend.cluster.started) == 4
    assert values(frontend.cluster.groups["m"]) == [b"a", b"b"]


@pytest.mark.parametrize("together", [5, 3, 1])
async def test_steps_behind_one_that_is_undone_are_not_applied_before_it_comes_again(
    frontend: Any, fakes: Any, monkeypatch: Any, together: int
) -> None:
    workers, write = await frontend.create(), SegmentWriter.write
    lost = RankLost("rank 0 died", outcome="unknown")

    async def dead() -> Any:
        raise lost

    def fails(self: SegmentWriter, parts: Any) -> int:
        if len(values(workers)) != 3 or workers.error is not None:
            return write(self, parts)
        workers.error, workers.state = lost, dead
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(SegmentWriter, "write", fails)
    workers.most_together = together
    requests = steps(frontend, fakes, b"a", b"b", b"c", b"d", b"e")
    stream = Stream(frontend)
    await stream.send(*requests)
    *applied, undone, behind, last = await stream.outcomes(5)
    assert [result.step for result in applied] == [1, 2]
    assert (undone.outcome, undone.retryable) == ("not_applied", True)
    assert behind.reason == last.reason == "STEP_BEFORE_REFUSED"
    stream = Stream(frontend)
    await stream.send(*requests[2:])
    assert [result.step for result in await stream.outcomes(3)] == [3, 4, 5]
    assert values(frontend.cluster.groups["m"])[-3:] == [b"c", b"d", b"e"]


async def test_a_client_that_does_not_read_holds_up_neither_the_model_nor_memory(start: Any, fakes: Any) -> None:
    async with start(requests_per_model=16) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        stream = Stream(frontend)
        sent = steps(frontend, fakes, *(bytes([value]) for value in range(1, 41)))
        await stream.send(*sent)
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.05)
        # As many wait as a quarter of a model's requests.
        queue = frontend.tenant._models._hosted["m"].life._queue
        assert queue._count <= 2
        unary = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"unary")))
        await asyncio.sleep(0.05)
        workers.gate.set()
        await unary
        assert values(workers).index(b"unary") <= 8
        assert [result.step for result in await stream.outcomes(40)][-1] == 41


async def test_a_stream_ends_when_the_service_drains_and_what_it_brought_is_answered(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    stream = Stream(frontend)
    await stream.send(*steps(frontend, fakes, b"a", b"b"))
    await frontend.until(lambda: workers.busy)
    draining = asyncio.ensure_future(frontend.service.drain())
    await asyncio.sleep(0.05)
    workers.gate.set()
    assert [result.step for result in await stream.outcomes(2)] == [1, 2]
    error = await error_of(stream)
    assert isinstance(error, Unavailable) and error.reason == "DRAINING"
    await asyncio.wait_for(draining, 5)


async def test_a_stream_of_which_nothing_comes_does_not_keep_its_place(start: Any, fakes: Any) -> None:
    async with start(stall_seconds=0.2) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        stream = Stream(frontend)
        await stream.send(*steps(frontend, fakes, b"a"))
        # It waits for the model, not for the client.
        await asyncio.sleep(0.5)
        workers.gate.set()
        assert [result.step for result in await stream.outcomes(1)] == [1]
        assert (await error_of(stream)).reason == "STREAM_STALLED"


async def test_steps_of_a_model_that_is_deleted_end(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    first = await held(frontend, workers)
    stream = Stream(frontend)
    await stream.send(*steps(frontend, fakes, b"a", b"b"))
    await asyncio.sleep(0.05)
    deletion = asyncio.ensure_future(frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m")))
    refused, behind = await stream.outcomes(2)
    assert refused.outcome == behind.outcome == "not_applied"
    workers.gate.set()
    await asyncio.gather(first, deletion, return_exceptions=True)
    assert values(workers) == [b"held"]
