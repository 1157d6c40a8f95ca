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
    """Counts the requests in flight. Used as a context manager around each.

    setting: what the limit is called. whole: that of all owners, of which this is one's part: each counts in both.
    """

    def __init__(self, limit: int, setting: str = "requests_in_flight", whole: Admission | None = None) -> None:
        self._limit = limit
        self._setting = setting
        self._whole = whole
        self._draining = False
        self._streams: set[Callable[[], None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0

    def __enter__(self) -> None:
        self._check()
        self._count(1)

    def _check(self) -> None:
        if self._whole is not None:
            self._whole._check()
        if self._draining:
            raise draining()
        if self.in_flight >= self._limit:
            raise ResourceExhausted(
                f"{self._limit} requests are in flight, as many as the server's setting {self._setting} allows",
                reason="TOO_MANY_REQUESTS",
                retryable=True,
                retry_after=0.1,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        if self._whole is not None:
            self._whole._count(change)
        self.in_flight += change
        if self.in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    def drain(self) -> None:
        """Refuse everything from now on."""
        self._draining = True
        for stop in tuple(self._streams):
            stop()

    @contextmanager
    def stops(self, stop: Callable[[], None]) -> Iterator[None]:
        """Inside, `stop` is called when the service drains: a stream of requests is to take no more."""
        streams = self._streams if self._whole is None else self._whole._streams
        streams.add(stop)
        try:
            yield
        finally:
            streams.discard(stop)

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()
