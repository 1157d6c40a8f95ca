"""Which requests get in: at most so many at once, and none while the service drains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from gradwire_proto.errors import ResourceExhausted, Unavailable


def draining() -> Unavailable:
    """The error of a request that comes too late."""
    return Unavailable("the service is stopping and takes no new requests", reason="DRAINING", retry_after=1.0)


class Admission:
    """Counts the requests in flight. Used as a context manager around each."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._draining = False
        self._streams: set[Callable[[], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0

    def __enter__(self) -> None:
        if self._draining:
            raise draining()
        if self.in_flight >= self._limit:
            raise ResourceExhausted(
                f"{self._limit} requests are in flight, as many as the server's setting requests_in_flight allows",
                reason="TOO_MANY_REQUESTS",
                retryable=True,
                retry_after=0.1,
            )
        self.in_flight += 1
        self._idle.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def drain(self) -> None:
        """Refuse everything from now on."""
        self._draining = True
        for stop in tuple(self._streams):
            stop()

    @contextmanager
    def stops(self, stop: Callable[[], None]) -> Iterator[None]:
        """Inside, `stop` is called when the service drains: a stream of requests is to take no more."""
        self._streams.add(stop)
        try:
            yield
        finally:
            self._streams.discard(stop)

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()
