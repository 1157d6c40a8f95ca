"""Loads are put on as they say, and latencies count from when requests were due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
import pytest

from gradwire.errors import ResourceExhausted
from gradwire.load_test import generators
from gradwire.load_test.connections import Connections
from gradwire.load_test.generators import precise_loop
from gradwire.load_test.levels import Level, measure
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.requests import Prepared
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

REQUEST = Prepared("ComputeGradients", pb.ComputeGradientsRequest(name="models/mine").SerializeToString())
REPLY = pb.ComputeGradientsResponse(timing=model_pb2.Timing(queue=0.001, total=0.002)).SerializeToString()


class Service:
    """Answers as `answer` does, in this process; `most` is how many requests were there at once."""

    def __init__(self, answer: Callable[[], Awaitable[object]], clients: int = 1) -> None:
        self.most = self._waiting = self.requests = 0
        self.by_client = [0] * clients
        self._answer = answer

    def calls(self, path: str, timeout: float) -> list[Callable[[bytes], Awaitable[bytes]]]:
        return [self._call(client) for client in range(len(self.by_client))]

    def _call(self, client: int) -> Callable[[bytes], Awaitable[bytes]]:
        async def call(body: bytes) -> bytes:
            self.requests += 1
            self.by_client[client] += 1
            self._waiting += 1
            self.most = max(self.most, self._waiting)
            await self._answer()
            self._waiting -= 1
            return REPLY

        return call


def measured(service: Service, load: Load, **options: Any) -> Level:
    given = Options(loads=(load,), **{"warm_up": 0.05, "window": 0.2, "max_windows": 3, "stable": 1e-9, **options})
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        connections = cast(Connections, service)
        return runner.run(measure(load, connections, [REQUEST], given, lambda text: None))


async def soon() -> None:
    await asyncio.sleep(0.01)


def test_concurrency_is_how_many_requests_wait_at_once_and_clients_take_turns() -> None:
    service = Service(soon, clients=3)
    level = measured(service, Load("concurrency", 6), warm_up=0.6)
    assert service.most == 6
    assert max(service.by_client) - min(service.by_client) <= 1
    assert level.rate <= 6 / 0.01
    assert level.latencies_ms["p50"] is not None and level.latencies_ms["p50"] >= 9.5
    # The warm-up is not measured; those that waited at the end are.
    waited = level.measured.latencies.count - sum(window.latencies.count for window in level.windows)
    assert 0 < waited <= 6
    assert level.measured.latencies.count < 0.75 * service.requests
    assert level.measured.seconds == pytest.approx(0.6, abs=0.5)


def test_rate_sends_as_many_as_are_due_whether_or_not_answers_come() -> None:
    service = Service(lambda: asyncio.sleep(1.2))
    level = measured(service, Load("rate", 100))
    seconds = level.measured.seconds
    assert service.requests == pytest.approx(100 * (seconds + 0.05), abs=8)
    assert service.most >= 45
    # Those that waited when the last window closed count as well, but not for the rate.
    assert level.measured.latencies.count == pytest.approx(100 * seconds, abs=12)
    assert level.rate < 60
    assert "below the rate" in level.notes


def test_stall_is_charged_to_all_requests_that_were_due_meanwhile(monkeypatch, start_scripted) -> None:
    """Four requests in flight at most: a tester that counted from the sending would see four of 250 that are slow."""
    monkeypatch.setattr(generators, "MOST_IN_FLIGHT", 4)
    began = time.monotonic()

    def answer(request, context) -> pb.ComputeGradientsResponse:
        # From 0.6 s after the beginning until 1.6 s nothing is answered.
        left = began + 1.6 - time.monotonic()
        if 0 < left < 1:
            time.sleep(left)
        return pb.ComputeGradientsResponse()

    scripted = start_scripted(answers={"ComputeGradients": answer})
    load = Load("rate", 100)
    options = Options(loads=(load,), warm_up=0.1, window=0.8, max_windows=3, stable=1e-9)

    async def run() -> Level:
        nonlocal began
        async with Connections(scripted.target, count=1) as connections:
            began = time.monotonic()
            return await measure(load, connections, [REQUEST], options, lambda text: None)

    with asyncio.Runner(loop_factory=precise_loop) as runner:
        level = runner.run(run())
    # A hundred of 240 waited, evenly from 1 s down to 0.
    latencies = level.latencies_ms
    assert latencies["p99"] == pytest.approx(975, abs=100)
    assert latencies["p90"] == pytest.approx(760, abs=200)
    assert latencies["p50"] is not None and latencies["p50"] < 100
    assert not level.stable


def test_level_ends_with_the_third_of_three_windows_that_agree() -> None:
    level = measured(Service(soon), Load("concurrency", 4), max_windows=9, stable=0.9)
    # More than three, where the machine is busy with something else.
    assert level.stable and 3 <= len(level.windows) < 9


def test_errors_are_counted_by_reason_and_a_level_that_only_fails_ends_early(start_scripted) -> None:
    def answer(request, context) -> None:
        if len(scripted.calls) % 2:
            raise ResourceExhausted("the queue is full", reason="QUEUE_FULL")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    scripted = start_scripted(answers={"ComputeGradients": answer})
    load = Load("concurrency", 2)

    async def run() -> Level:
        async with Connections(scripted.target, count=1, token="secret") as connections:
            options = Options(loads=(load,), warm_up=0.0, window=0.2)
            return await measure(load, connections, [REQUEST], options, lambda text: None)

    level = asyncio.run(run())
    assert (len(level.windows), level.rate, level.stable) == (1, 0, False)
    assert level.measured.errors.keys() == {"QUEUE_FULL", "CONNECTION_LOST"}
    # None was sent again, and a client that failed pauses before the next.
    assert level.errors == len(scripted.calls) <= 2 * level.measured.seconds / 0.01 + 4
    assert set(scripted.tokens) == {"Bearer secret"}


def test_defect_of_the_tester_ends_the_test() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        measured(Service(broken), Load("rate", 100))
    assert raised.group_contains(ZeroDivisionError)
