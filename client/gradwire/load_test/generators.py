"""What sends the requests: as many at once as a level says, or at the times at which they are due.

Closed loop: each of N clients sends its next request when the one before was answered; latency counts from the
sending. Open loop: requests come at a rate, whether or not earlier ones were answered, and latency counts from when a
request was DUE: a service that stalls is charged for all who would have come meanwhile (no coordinated omission), and
so is a tester that is late.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import cycle
from typing import Any

from gradwire.load_test.connections import CallFailed, Connections
from gradwire.load_test.requests import Prepared
from gradwire.load_test.windows import Recorder

MOST_IN_FLIGHT = 4096
"""Requests of an open loop that wait at once. More are sent later than due, and counted from when they were."""

_PAUSE = 0.01
"""Seconds until a client of a closed loop comes again after an error: one that fails at once must not spin."""

_NAP = 0.1
"""Seconds that an open loop sleeps at most, before it looks whether it is over."""


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose sleeps are exact to some 0.1 ms; epoll, the default, rounds them up to whole milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Sender:
    """Sends the requests in turn, each over the next connection, and has the recorder take down how they end."""

    def __init__(
        self, connections: Connections, requests: Sequence[Prepared], recorder: Recorder, timeout: float
    ) -> None:
        self._connections = connections
        self._recorder = recorder
        calls = {request.path: connections.calls(request.path, timeout) for request in requests}
        clients = range(len(calls[requests[0].path]))
        self._turns = cycle([(calls[request.path][client], request) for client in clients for request in requests])

    async def send(self, due: int | None = None) -> bool:
        """Send one request; whether it succeeded. due: when it should have been sent, on `time.monotonic_ns`."""
        call, request = next(self._turns)
        message = request.message()
        sent = time.monotonic_ns()
        since = sent if due is None else due
        try:
            reply = await call(message)
        except CallFailed as failure:
            self._recorder.failed(self._connections.reason(failure))
            return False
        self._recorder.succeeded(time.monotonic_ns() - since, sent - since, reply)
        return True


async def closed_loop(send: Callable[[], Coroutine[Any, Any, bool]], concurrency: int, over: asyncio.Event) -> None:
    """Keep `concurrency` requests in flight until `over`; returns when all are answered."""

    async def client() -> None:
        while not over.is_set():
            if not await send():
                await asyncio.sleep(_PAUSE)

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())


async def open_loop(
    send: Callable[[int], Coroutine[Any, Any, bool]],
    due_times: Iterable[float],
    over: asyncio.Event,
    unsent: Callable[[int], None],
) -> None:
    """Send a request at each of `due_times`, in seconds from now, until `over`; returns when all are answered.

    unsent: called where requests were due and not sent by then, with the nanoseconds that the first had waited.
    """
    in_flight: set[asyncio.Task[bool]] = set()
    start = time.monotonic_ns()
    async with asyncio.TaskGroup() as requests:
        for seconds in due_times:
            due = start + round(seconds * 1e9)
            is_late = True
            while not over.is_set() and ((left := due - time.monotonic_ns()) > 0 or len(in_flight) >= MOST_IN_FLIGHT):
                await asyncio.sleep(min(max(left / 1e9, 0.0005), _NAP))
                is_late = False
            if is_late:
                # Answers have to be read all the same.
                await asyncio.sleep(0)
            if over.is_set():
                waited = time.monotonic_ns() - due
                if waited >= 0:
                    unsent(waited)
                return
            task = requests.create_task(send(due))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)
