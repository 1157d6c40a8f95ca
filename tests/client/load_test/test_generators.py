"""Requests at a rate: each counts from when it was due, also one that was never sent."""

from __future__ import annotations

import asyncio
import time
from itertools import count

import pytest

from gradwire.load_test import generators
from gradwire.load_test.windows import Recorder


def test_requests_that_wait_behind_too_many_others_count_with_the_time_that_they_had_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generators, "MOST_IN_FLIGHT", 10)
    recorder, sent = Recorder(lambda reply: None), []

    async def run() -> None:
        over, answered = asyncio.Event(), asyncio.Event()

        async def send(due: int) -> bool:
            sent.append(due)
            return await answered.wait()

        def unsent(waited_ns: int) -> None:
            recorder.unsent(waited_ns, 100)

        # 100 a second, of a service that stands still.
        times = (number / 100 for number in count())
        loop = asyncio.create_task(generators.open_loop(send, times, over, unsent))
        await asyncio.sleep(1.0)
        over.set()
        await asyncio.sleep(0.2)
        answered.set()
        await loop

    asyncio.run(run())
    window = recorder.window
    assert len(sent) == 10
    assert 88 <= window.unsent <= 115 and window.latencies.count == window.lags.count == window.unsent
    # Due from 0.1 s on until it was over: waits from 0.9 s down to none.
    assert window.latencies.highest == pytest.approx(900_000, rel=0.2)
    assert window.latencies.percentile(50.0) == pytest.approx(450_000, rel=0.2)


def test_millions_that_were_not_sent_are_counted_in_no_time() -> None:
    recorder, seconds, rate = Recorder(lambda reply: None), 50.0, 100_000
    began = time.process_time()
    recorder.unsent(round(seconds * 1e9), rate)
    window = recorder.window
    assert time.process_time() - began < 1
    assert window.unsent == window.latencies.count == window.lags.count == seconds * rate + 1
    for percent in (1.0, 50.0, 99.0):
        assert window.latencies.percentile(percent) == pytest.approx(percent / 100 * seconds * 1e6, rel=0.01)
