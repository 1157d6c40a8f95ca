"""Requests that take turns, in the order of arrival; what nobody waits for any more is not begun."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from gradwire_proto.errors import Cancelled, DeadlineExceeded, GradwireError, ResourceExhausted
from gradwire_proto.values import TensorData
from gradwire_server.begun import begin
from gradwire_server.calls import Call
from gradwire_server.failures import public_error
from gradwire_server.tensors.uploads import Claim, Uploads

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unsettled(Generic[T]):
    """What work may return: its result, or its `error`, counts once `settled` is done; the next work begins meanwhile.

    Where `settled` ends with an error, so does the job; `Job.confirm` takes that back.
    """

    result: T | None
    settled: asyncio.Future[None]
    error: GradwireError | None = None


class Job(Generic[T]):
    """A request in a queue. Several callers may wait for it; it begins only while one of them still does.

    `claim` holds its tensors: spent when the work has ended, given back when it will never begin. For the rest see
    `WorkQueue.submit`.
    """

    def __init__(
        self,
        call: Call,
        claim: Claim[Any],
        work: Callable[[Any], Awaitable[T | Unsettled[T]]],
        failed: Callable[[GradwireError], None] | None,
    ) -> None:
        self.error: GradwireError | None = None
        self.reply: bytes | None = None
        """The bytes of its response, where they are at hand."""
        self.kills = 0
        """How often ranks were lost in the middle of it, which had nothing else to do."""
        self._request_id = call.request_id
        self._claim = claim
        self._work: Callable[[Any], Awaitable[T | Unsettled[T]]] | None = work
        self._failed = failed
        self._begun: Callable[[Any], Awaitable[T | Unsettled[T]]] | None = None
        self._result: T | None = None
        self._settled_error: GradwireError | None = None
        self._is_undone = False
        self._waiters = 0
        self._awaited = False
        self._deadline: float | None = None
        self._has_ended = False
        self._at_end: list[Callable[[Job[T]], None]] = []

    def on_end(self, callback: Callable[[Job[T]], None], *, first: bool = False) -> None:
        """Have `callback` called at the end, before those who wait are woken; now, where that has been. first: before
        all others.
        """
        if self._has_ended:
            callback(self)
        elif first:
            self._at_end.insert(0, callback)
        else:
            self._at_end.append(callback)

    @property
    def uploads(self) -> dict[str, list[TensorData]]:
        """The uploads that it uses, by name, while it waits or runs."""
        return self._claim.used

    @property
    def ended(self) -> bool:
        """Whether it has a result or an error."""
        return self._has_ended

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
                self.refuse(_given_up())
            raise
        finally:
            self._waiters -= 1
        if self.error is not None:
            # A copy: a raised error holds on to its frames, and they to the request's tensors.
            raise copy.copy(self.error)
        return cast(T, self._result)

    async def wait(self) -> None:
        """Wait for the end, without wanting the work done."""
        if self._has_ended:
            return
        # One's own: work that has begun ends, whoever waits for it.
        waiter = asyncio.get_running_loop().create_future()
        self._at_end.append(lambda _: None if waiter.done() else waiter.set_result(None))
        await waiter

    async def run(self) -> None:
        """Do the work, unless it was refused or the last caller's deadline has passed."""
        self.expire()
        work, self._work = self._work, None
        if work is None:
            return
        try:
            self._take(await work(self._claim.value))
        except Exception as error:
            self._fail(error)
        except BaseException:
            self.error = Cancelled("the service stopped", outcome="unknown" if self._failed else "not_applied")
            self._end()
            raise
        finally:
            self._claim.spend()

    def expire(self) -> None:
        """Refuse it if the deadline of all who wait for it has passed."""
        if self._deadline is not None and self._deadline <= time.monotonic():
            self.refuse(DeadlineExceeded("the deadline passed in the queue; nothing was applied"))

    def _end(self) -> None:
        assert not self._has_ended, "a job ends once"
        self._has_ended = True
        at_end, self._at_end = self._at_end, []
        for callback in at_end:
            callback(self)

    def _take(self, outcome: T | Unsettled[T]) -> None:
        if not isinstance(outcome, Unsettled):
            self._result = outcome
            self._end()
            return
        self._result, self._settled_error = outcome.result, outcome.error
        outcome.settled.add_done_callback(self._settle)

    def _settle(self, settled: asyncio.Future[None]) -> None:
        self.error = self._settled_error
        if settled.cancelled():
            self.error = Cancelled("the service stopped", outcome="unknown" if self._failed else "not_applied")
        elif (error := settled.exception()) is not None:
            self.error = copy.copy(public_error(error, self._request_id, outcome="unknown"))
            if not self._failed:
                # What it looked at may be undone; of itself nothing is left.
                self.error.outcome = "not_applied"
        self._end()

    def _fail(self, error: Exception) -> None:
        # A defect in the middle of a command may have left anything behind; a read leaves nothing.
        outcome = "unknown" if self._failed else "not_applied"
        self.error = copy.copy(public_error(error, self._request_id, outcome=outcome))
        if self._failed:
            self._failed(self.error)
        self._end()

    @property
    def waits(self) -> bool:
        """Whether it was neither begun nor refused."""
        return self._work is not None

    # What several jobs that run at once are told in place of `run`.

    def begin(self) -> None:
        """It has begun: `take`, `fail`, `cut` or `put_back` must follow. Its tensors are in its request."""
        self._begun, self._work = self._work, None

    def put_back(self) -> None:
        """It was not carried out after all, and waits again, where somebody still does for it."""
        self._work, self._begun = self._begun, None
        if not self._waiters:
            self.refuse(_given_up())

    def take(self, outcome: T | Unsettled[T]) -> None:
        """It is done."""
        self._begun = None
        self._take(outcome)

    def fail(self, error: Exception) -> None:
        """It ends with this error."""
        self._begun = None
        self._fail(error)

    def cut(self) -> None:
        """Nobody will know what became of it: the service stops."""
        self.error = Cancelled("the service stopped", outcome="unknown")
        self._end()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended, or will once it is settled, with an error."""
        return self.error is not None or self._settled_error is not None or self._is_undone

    def undo(self) -> None:
        """What it did is undone before it could be settled: it will end with an error."""
        self._is_undone = True

    @property
    def value(self) -> T:
        """What it gave, once it has ended without an error."""
        return cast(T, self._result)

    def join(self) -> None:
        """Want the work done, however long it takes, until `leave`."""
        self._waiters += 1
        self._awaited, self._deadline = True, None

    def leave(self) -> None:
        """Want it no more: if nobody does and it was not begun, it never will be."""
        self._waiters -= 1
        if not self._waiters:
            self.refuse(_given_up())

    def confirm(self) -> None:
        """What could not be settled when the work had ended is so now: the result counts."""
        self.error = self._settled_error

    def refuse(self, error: GradwireError) -> None:
        """End it with an error, if it was not begun."""
        if self._work is None:
            return
        self._work = None
        self._claim.give_back()
        self.error = error
        self._end()


def _given_up() -> Cancelled:
    return Cancelled("the caller gave up while the request was in the queue; nothing was applied")


def queue_full(limit: int) -> ResourceExhausted:
    """The error of one request too many."""
    return ResourceExhausted(
        f"{limit} requests wait or run, which the server's setting requests_per_model allows",
        reason="QUEUE_FULL",
        retryable=True,
        retry_after=0.1,
    )


class WorkQueue:
    """Runs requests one by one. At most `limit`, the setting requests_per_model, wait or run."""

    def __init__(self, uploads: Uploads, limit: int) -> None:
        self._uploads = uploads
        self._limit = limit
        self._jobs: deque[Job[Any]] = deque()
        self._count = 0
        self._in_turns = 0
        """Requests in turns, less these turns."""
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._runs = False
        self._runner: asyncio.Future[None] | None = None
        """What runs them, or has."""
        self._running: Job[Any] | None = None
        self._closed: GradwireError | None = None

    def submit(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any], Awaitable[T | Unsettled[T]]],
        failed: Callable[[GradwireError], None] | None = None,
        *,
        limited: bool = True,
        counted: bool = True,
        at_once: bool = False,
    ) -> Job[T]:
        """Let `work(tensors)` run in its turn, with the handles in `tensors` (nested) resolved.

        `failed`, of commands, hears of the work's error before the next work begins. Without `limited`, for what no
        client asks for, there is always room. Without `counted` it is a turn of requests that `enter` counts. at_once:
        where nothing runs or waits, it begins before this returns; see `begin`. Raises ResourceExhausted QUEUE_FULL,
        ModelNotFound UPLOAD_NOT_FOUND, or the error of `close`.
        """
        self._check_room(limited)
        job = Job(call, self._uploads.claim(tensors), work, failed)
        job.on_end(self._forget)
        self._jobs.append(job)
        self._count += 1
        if not counted:
            self._count_requests(-1)
            job.on_end(lambda _: self._count_requests(1))
        self._all_ended.clear()
        if not self._runs:
            self._runs = True
            self._runner = begin(self._run()) if at_once else asyncio.get_running_loop().create_task(self._run())
        return job

    def enter(self) -> None:
        """One more request is in a turn that was not counted itself, until `leave`. Raises as `submit`."""
        self._check_room(True)
        self._count_requests(1)

    def leave(self) -> None:
        """It has ended."""
        self._count_requests(-1)

    def _check_room(self, limited: bool) -> None:
        if self._closed is not None:
            raise copy.copy(self._closed)
        if limited and self._count + self._in_turns >= self._limit:
            raise queue_full(self._limit)

    def _count_requests(self, change: int) -> None:
        self._in_turns += change

    def is_last(self, job: Job[Any]) -> bool:
        """Whether it waits or runs, and nothing waits behind it."""
        return self._jobs[-1] is job if self._jobs else self._running is job

    def _forget(self, job: Job[Any]) -> None:
        self._count -= 1
        if not self._count:
            self._all_ended.set()
        if job in self._jobs:
            self._jobs.remove(job)

    async def _run(self) -> None:
        try:
            while self._jobs:
                self._running = self._jobs.popleft()
                await self._running.run()
        finally:
            self._runs, self._running = False, None

    async def close(self, error: GradwireError, patience: float) -> bool:
        """Refuse what waits and what still comes with `error`. Says whether what runs ended in `patience` seconds."""
        self._closed = error
        for job in tuple(self._jobs):
            job.refuse(error)
        return await self.idle(patience)

    async def idle(self, patience: float | None = None) -> bool:
        """Return when nothing waits, runs or settles; False where that takes longer than `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self._all_ended.wait()
                if self._runner is not None:
                    await asyncio.wait([self._runner])
        except TimeoutError:
            return False
        return True

    async def cut(self) -> None:
        """Cancel what runs."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
