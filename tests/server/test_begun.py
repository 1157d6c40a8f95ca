"""Coroutines that begin at once, and go on as those of tasks do."""

from __future__ import annotations

import asyncio

import pytest

from gradwire_server.begun import begin


async def test_what_comes_before_the_first_wait_happens_at_once_and_the_rest_in_a_task() -> None:
    gate, told = asyncio.get_running_loop().create_future(), []

    async def work() -> str:
        told.append("begun")
        told.append(await gate)
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        return "ended"

    task = begin(work())
    assert told == ["begun"] and not task.done()
    gate.set_result("woken")
    assert await task == "ended" and told == ["begun", "woken"]


async def test_what_never_waits_has_ended_at_once() -> None:
    async def work(error: Exception | None) -> int:
        if error is not None:
            raise error
        return 7

    assert begin(work(None)).result() == 7
    with pytest.raises(ValueError, match="no"):
        begin(work(ValueError("no"))).result()


@pytest.mark.parametrize("turns", [0, 2])
async def test_one_that_is_cancelled_hears_of_it_however_early(turns: int) -> None:
    told = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    task = begin(work())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == ["cancelled"]
