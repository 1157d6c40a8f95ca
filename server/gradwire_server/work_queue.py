"""One thing at a time, in the order of arrival; what nobody waits for any more is not begun."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, cast

from gradwire_proto.errors import Cancelled, DeadlineExceeded, GradwireError, ResourceExhausted
from gradwire_server.failures import public_error

T = TypeVar("T")


class Job(Generic[T]):
    """A piece of work in a queue. Several callers may wait for it; it begins only while one of them still does.

    Exactly one of `work` and `unused` is called.
    """

    def __init__(self, work: Callable[[], Awaitable[T]], unused: Callable[[], None] | None) -> None:
        self.error: GradwireError | None = None
        self._work: Callable[[], Awaitable[T]] | None = work
        self._unused = unused
        self._result: T | None = None
        self._waiters = 0
        self._awaited = False
        self._deadline: float | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_end(self, callback: Callable[[Job[T]], None]) -> None:
        """Have `callback` called soon after the end, before those who wait are woken."""
        self._ended.add_done_callback(lambda _: callback(self))

    @property
    def ended(self) -> bool:
        """Whether it has a result or an error."""
        return self._ended.done()

    async def result(self, deadline: float | None) -> T:
        """Wait for the end. `deadline`: when this caller stops waiting (time.monotonic(); None: never)."""
        self._waiters += 1
        if not self._awaited:
            self._awaited, self._deadline = True, deadline
        elif self._deadline is not None:
            self._deadline = None if deadline is None else max(deadline, self._deadline)
        try:
            await self.wait()
        except asyncio.CancelledError:
            if self._waiters == 1:
                self.refuse(Cancelled("the caller gave up while the request was in the queue; nothing was applied"))
            raise
        finally:
            self._waiters -= 1
        if self.error is not None:
            # A copy: a raised error holds on to its frames, and they to the request's tensors.
            raise copy.copy(self.error)
        return cast(T, self._result)

    async def wait(self) -> None:
        """Wait for the end, without wanting the work done."""
        # Shielded: work that has begun ends, whoever waits for it.
        await asyncio.shield(self._ended)

    async def run(self) -> None:
        """Do the work, unless it was refused or the last caller's deadline has passed."""
        if self._deadline is not None and self._deadline <= time.monotonic():
            self.refuse(DeadlineExceeded("the deadline passed in the queue; nothing was applied"))
        work, self._work, self._unused = self._work, None, None
        if work is None:
            return
        try:
            self._result = await work()
        except Exception as error:
            self.error = copy.copy(public_error(error, None, outcome="unknown"))
        except BaseException:
            self.error = Cancelled("the service stopped", outcome="unknown")
            raise
        finally:
            self._ended.set_result(None)

    def refuse(self, error: GradwireError) -> None:
        """End it with an error, if it was not begun."""
        if self._work is None:
            return
        self._work = None
        if self._unused is not None:
            self._unused()
        self.error = error
        self._ended.set_result(None)


class WorkQueue:
    """Runs jobs one by one. At most `limit` wait or run; `setting` is the limit's name in errors."""

    def __init__(self, limit: int, setting: str) -> None:
        self._limit = limit
        self._setting = setting
        self._jobs: deque[Job[Any]] = deque()
        self._count = 0
        self._runner: asyncio.Task[None] | None = None
        self._closed: GradwireError | None = None

    def check_room(self) -> None:
        """Raise what `submit` would: ResourceExhausted QUEUE_FULL, or the error of `close`."""
        if self._closed is not None:
            raise copy.copy(self._closed)
        if self._count >= self._limit:
            raise ResourceExhausted(
                f"{self._limit} requests wait or run, which the server's setting {self._setting} allows",
                reason="QUEUE_FULL",
                retryable=True,
                retry_after=0.1,
            )

    def submit(self, work: Callable[[], Awaitable[T]], unused: Callable[[], None] | None = None) -> Job[T]:
        """Put work at the end of the queue. `unused` is called instead of `work` when it will never begin."""
        self.check_room()
        job = Job(work, unused)
        job.on_end(self._forget)
        self._jobs.append(job)
        self._count += 1
        if self._runner is None:
            self._runner = asyncio.get_running_loop().create_task(self._run())
        return job

    def _forget(self, job: Job[Any]) -> None:
        self._count -= 1
        if job in self._jobs:
            self._jobs.remove(job)

    async def _run(self) -> None:
        try:
            while self._jobs:
                await self._jobs.popleft().run()
        finally:
            self._runner = None

    async def close(self, error: GradwireError) -> None:
        """Refuse what waits and what still comes with `error`; return when what runs has ended."""
        self._closed = error
        for job in self._jobs:
            job.refuse(error)
        await self.idle()

    async def idle(self) -> None:
        """Return when nothing waits or runs."""
        if self._runner is not None:
            await asyncio.wait([self._runner])
