"""The queue by itself: what begins, what does not, and what each caller is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    ResourceExhausted,
)
from gradwire_proto.values import Handle, Limits, TensorData
from gradwire_server.calls import Call
from gradwire_server.tensors.held_files import TensorType
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.tensors.uploads import Uploads
from gradwire_server.work_queue import Job, Unsettled, WorkQueue


class Queue(WorkQueue):
    """A queue for requests without tensors, unless a test says otherwise."""

    def __init__(self, uploads: Uploads, limit: int = 8) -> None:
        super().__init__(uploads, limit)

    def put(self, work: Callable[[Any], Awaitable[Any]], tensors: Any = None, failed: Any = None) -> Job[Any]:
        return self.submit(Call(), tensors, work, failed)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return TensorStore(tmp_path, Limits()).uploads


def returning(value: int, log: list[int]) -> Callable[[Any], Awaitable[int]]:
    async def work(_: Any) -> int:
        log.append(value)
        await asyncio.sleep(0.01)
        return value

    return work


async def test_work_whose_deadline_has_passed_is_not_begun(uploads: Uploads) -> None:
    queue, log = Queue(uploads), []

    async def one_byte() -> Any:
        yield b"x"

    name = await uploads.take([TensorType("uint8", (1,))], one_byte())
    tensors = {"w": TensorData("uint8", (1,), Handle(f"{name}/tensors/0"))}
    job = queue.put(returning(1, log), tensors)
    with pytest.raises(DeadlineExceeded) as caught:
        await job.result(time.monotonic() - 1)
    assert caught.value.outcome == "not_applied" and not log
    uploads.claim(tensors).spend()  # It was given back.


async def test_the_latest_deadline_of_those_who_wait_counts(uploads: Uploads) -> None:
    queue, log = Queue(uploads), []
    first = asyncio.ensure_future(queue.put(returning(1, log)).result(None))
    job = queue.put(returning(2, log))
    passed = time.monotonic() - 1
    waits = [job.result(passed), job.result(None), job.result(passed), first]
    assert await asyncio.gather(*waits) == [2, 2, 2, 1] and log == [1, 2]


async def test_work_is_begun_only_while_somebody_waits(uploads: Uploads) -> None:
    queue, log = Queue(uploads), []
    first = asyncio.ensure_future(queue.put(returning(1, log)).result(None))
    job = queue.put(returning(2, log))
    callers = [asyncio.ensure_future(job.result(None)) for _ in range(2)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.sleep(0)
    assert not job.ended
    callers[1].cancel()
    await first
    await queue.idle()
    assert log == [1] and isinstance(job.error, Cancelled)


async def test_work_that_comes_back_from_the_ranks_is_not_begun_again_where_nobody_waits(uploads: Uploads) -> None:
    queue, log = Queue(uploads), []
    jobs = [queue.put(returning(n, log)) for n in range(2)]
    for job in jobs:
        job.join()
        job.begin()
    jobs[0].leave()
    for job in jobs:
        job.put_back()
    await queue.idle(1)
    assert log == [1] and isinstance(jobs[0].error, Cancelled) and jobs[0].error.outcome == "not_applied"


async def test_refused_work_makes_room_at_once(uploads: Uploads) -> None:
    queue, log = Queue(uploads, 2), []
    first = asyncio.ensure_future(queue.put(returning(1, log)).result(None))
    second = asyncio.ensure_future(queue.put(returning(2, log)).result(None))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="setting requests_per_model"):
        queue.put(returning(9, log))
    second.cancel()
    await asyncio.wait([second])
    assert await queue.put(returning(3, log)).result(None) == 3
    assert await first == 1 and log == [1, 3]


async def test_each_caller_gets_an_error_of_its_own(uploads: Uploads) -> None:
    async def fail(_: Any) -> None:
        raise InvalidArgument("no", field="x")

    job = Queue(uploads).put(fail)
    errors = await asyncio.gather(job.result(None), job.result(None), return_exceptions=True)
    assert errors[0] is not errors[1] and job.error is not None and job.error.__traceback__ is None
    assert all(isinstance(error, InvalidArgument) and error.field == "x" for error in errors)


async def test_defect_ends_its_own_work_and_no_other(uploads: Uploads) -> None:
    async def break_down(_: Any) -> int:
        raise RuntimeError("secret")

    queue, log = Queue(uploads), []
    results = await asyncio.gather(
        queue.put(break_down).result(None), queue.put(returning(1, log)).result(None), return_exceptions=True
    )
    assert isinstance(results[0], InternalError) and "secret" not in str(results[0]) and results[1] == 1


async def test_closing_refuses_what_waits_and_waits_for_what_runs(uploads: Uploads) -> None:
    queue, log = Queue(uploads), []
    calls = [asyncio.ensure_future(queue.put(returning(n, log)).result(None)) for n in range(3)]
    await asyncio.sleep(0.005)
    assert await queue.close(FailedPrecondition("gone"), 5)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert results[0] == 0 and log == [0] and all(isinstance(error, FailedPrecondition) for error in results[1:])
    with pytest.raises(FailedPrecondition, match="gone"):
        queue.put(returning(4, log))


async def test_closing_waits_no_longer_than_it_is_told_and_what_runs_can_be_cut(uploads: Uploads) -> None:
    async def for_ever(_: Any) -> None:
        await asyncio.Event().wait()

    queue = Queue(uploads)
    waiting = asyncio.ensure_future(queue.put(for_ever, failed=lambda error: None).result(None))
    await asyncio.sleep(0.005)
    assert not await queue.close(FailedPrecondition("gone"), 0.05)
    await queue.cut()
    with pytest.raises(Cancelled) as caught:
        await waiting
    assert caught.value.outcome == "unknown"


async def test_a_command_s_error_is_heard_before_the_next_work_begins(uploads: Uploads) -> None:
    async def fail(_: Any) -> None:
        log.append("failing")
        raise RuntimeError("secret")

    async def look(_: Any) -> None:
        log.append("next")

    queue, log = Queue(uploads), []
    jobs = [queue.put(fail, failed=lambda error: log.append(error.outcome)), queue.put(look), queue.put(fail)]
    results = await asyncio.gather(*(job.result(None) for job in jobs), return_exceptions=True)
    assert log == ["failing", "unknown", "next", "failing"]
    assert [getattr(result, "outcome", None) for result in results] == ["unknown", None, "not_applied"]


async def test_result_that_is_not_settled_is_waited_for_while_the_next_work_runs(uploads: Uploads) -> None:
    queue, log = Queue(uploads), []
    settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def unsettled(_: Any) -> Unsettled[int]:
        return Unsettled(1, settled)

    first, second = queue.put(unsettled), queue.put(returning(2, log))
    waiting = asyncio.ensure_future(first.result(None))
    assert await second.result(None) == 2 and not waiting.done() and not first.ended
    assert not await queue.idle(0.01)
    settled.set_result(None)
    assert await waiting == 1 and await queue.idle(1)


async def test_result_that_cannot_be_settled_is_an_error_until_it_is_confirmed(uploads: Uploads) -> None:
    queue = Queue(uploads)
    settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def unsettled(_: Any) -> Unsettled[int]:
        return Unsettled(1, settled)

    job = queue.put(unsettled)
    settled.set_exception(ResourceExhausted("full", outcome="unknown"))
    with pytest.raises(ResourceExhausted):
        await job.result(None)
    job.confirm()
    assert await job.result(None) == 1
