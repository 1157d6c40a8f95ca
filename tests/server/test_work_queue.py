"""The queue by itself: what begins, what does not, and what each caller is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from gradwire_proto.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    ResourceExhausted,
)
from gradwire_server.work_queue import WorkQueue


def returning(value: int, log: list[int]) -> Callable[[], Awaitable[int]]:
    async def work() -> int:
        log.append(value)
        await asyncio.sleep(0.01)
        return value

    return work


async def test_work_whose_deadline_has_passed_is_not_begun() -> None:
    queue, log, unused = WorkQueue(8, "limit"), [], []
    job = queue.submit(returning(1, log), lambda: unused.append(1))
    with pytest.raises(DeadlineExceeded) as caught:
        await job.result(time.monotonic() - 1)
    assert caught.value.outcome == "not_applied" and not log and unused == [1]


async def test_the_latest_deadline_of_those_who_wait_counts() -> None:
    queue, log = WorkQueue(8, "limit"), []
    first = asyncio.ensure_future(queue.submit(returning(1, log)).result(None))
    job = queue.submit(returning(2, log))
    passed = time.monotonic() - 1
    waits = [job.result(passed), job.result(None), job.result(passed), first]
    assert await asyncio.gather(*waits) == [2, 2, 2, 1] and log == [1, 2]


async def test_work_is_begun_only_while_somebody_waits() -> None:
    queue, log, unused = WorkQueue(8, "limit"), [], []
    first = asyncio.ensure_future(queue.submit(returning(1, log)).result(None))
    job = queue.submit(returning(2, log), lambda: unused.append(2))
    callers = [asyncio.ensure_future(job.result(None)) for _ in range(2)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.sleep(0)
    assert not job.ended
    callers[1].cancel()
    await first
    await queue.idle()
    assert log == [1] and unused == [2] and isinstance(job.error, Cancelled)


async def test_refused_work_makes_room_at_once() -> None:
    queue, log = WorkQueue(2, "limit"), []
    first = asyncio.ensure_future(queue.submit(returning(1, log)).result(None))
    second = asyncio.ensure_future(queue.submit(returning(2, log)).result(None))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="setting limit"):
        queue.check_room()
    second.cancel()
    await asyncio.wait([second])
    assert await queue.submit(returning(3, log)).result(None) == 3
    assert await first == 1 and log == [1, 3]


async def test_each_caller_gets_an_error_of_its_own() -> None:
    async def fail() -> None:
        raise InvalidArgument("no", field="x")

    job = WorkQueue(8, "limit").submit(fail)
    errors = await asyncio.gather(job.result(None), job.result(None), return_exceptions=True)
    assert errors[0] is not errors[1] and job.error is not None and job.error.__traceback__ is None
    assert all(isinstance(error, InvalidArgument) and error.field == "x" for error in errors)


async def test_defect_ends_its_own_work_and_no_other() -> None:
    async def break_down() -> int:
        raise RuntimeError("secret")

    queue, log = WorkQueue(8, "limit"), []
    results = await asyncio.gather(
        queue.submit(break_down).result(None), queue.submit(returning(1, log)).result(None), return_exceptions=True
    )
    assert isinstance(results[0], InternalError) and "secret" not in str(results[0]) and results[1] == 1


async def test_closing_refuses_what_waits_and_waits_for_what_runs() -> None:
    queue, log = WorkQueue(8, "limit"), []
    calls = [asyncio.ensure_future(queue.submit(returning(n, log)).result(None)) for n in range(3)]
    await asyncio.sleep(0.005)
    await queue.close(FailedPrecondition("gone"))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert results[0] == 0 and log == [0] and all(isinstance(error, FailedPrecondition) for error in results[1:])
    with pytest.raises(FailedPrecondition, match="gone"):
        queue.submit(returning(4, log))
