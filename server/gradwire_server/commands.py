"""How the requests of one model run: in turn, each command once, numbered, and in the journal before it is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import SplitDecision, StepResult
from gradwire_server.calls import Call
from gradwire_server.failures import public_error
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_records import ModelRecords
from gradwire_server.replies import with_times, without_tensors
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.records import Entry, StoredUpload
from gradwire_server.stored_replies import EndedCommand, kills_ranks, room_for_reply, stored_reply
from gradwire_server.tensors.uploads import resolve
from gradwire_server.work_queue import Job, Unsettled, WorkQueue

if TYPE_CHECKING:
    from gradwire_server.step_jobs import StepJob

T = TypeVar("T")

Deliver = Callable[[T], Awaitable[T]]
"""Changes a reply, not the model."""


class Commands:
    """See the module. `number` is that of the last command that was applied.

    released: names of retained forwards that were let go of since it was asked last. applied: called in the turn of a
    command that was applied.
    """

    def __init__(
        self,
        description: ModelDescription,
        queue: WorkQueue,
        log: RequestLog[Job[Any]],
        ranks: LiveRanks,
        records: ModelRecords,
        *,
        released: Callable[[], tuple[str, ...]],
        applied: Callable[[], None],
    ) -> None:
        self.number = 0
        self.log = log
        self._description = description
        self._queue = queue
        self._ranks = ranks
        self._records = records
        self._released = released
        self._applied = applied
        self._splits: Mapping[str, SplitDecision] = {}
        """How batches were spread before the command that runs."""

    async def run(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any, int], Awaitable[T]],
        deliver: Deliver[T] | None = None,
    ) -> T:
        """Run `work(tensors, number)` once for the request id of `call`. A repeat waits for it, or gets its reply."""
        if call.replay is not None:
            return await self._run_again(call, tensors, work, deliver)
        request = self.log.find(call)
        if request is not None and _is_unknown(request):
            await self._records.try_to_mend()
            request = self.log.find(call)
        if request is None:
            request = self._begin(call, tensors, work, deliver)
        return await request.result(call.deadline)

    async def seen(self, request_id: str) -> Job[Any] | EndedCommand | None:
        """The request with that id, settled where it can be. See RequestLog.get."""
        request = self.log.get(request_id)
        if request is None or not _is_unknown(request):
            return request
        await self._records.try_to_mend()
        return self.log.get(request_id)

    async def read(self, call: Call, tensors: Any, work: Callable[[Any], Awaitable[T]]) -> T:
        """Run `work(tensors)`, which changes nothing, in its turn."""
        return await self.begin(call, tensors, work).result(call.deadline)

    def begin(self, call: Call, tensors: Any, work: Callable[[Any], Awaitable[T]]) -> Job[T]:
        """Let `work(tensors)`, which changes nothing, run in its turn."""
        submitted = time.monotonic()

        async def look(values: Any) -> T | Unsettled[T]:
            queue = time.monotonic() - submitted
            result, recovery = await self._ranks.run(lambda: work(values), changes=False)
            seen = self.number
            # Of a journal that is broken nothing outlives what it should before it is mended.
            await self._records.usable()
            if self.number < seen:
                result, recovery = await self._ranks.run(lambda: work(values), changes=False)
            result = with_times(result, call, queue, recovery)
            # What was seen must outlive what the commands before outlive.
            return result if self._records.unsettled is None else Unsettled(result, self._records.unsettled)

        return self.take_turn(call, tensors, look)

    def take_turn(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any], Awaitable[T | Unsettled[T]]],
        failed: Callable[[GradwireError], None] | None = None,
        *,
        limited: bool = True,
        counted: bool = True,
    ) -> Job[T]:
        """Let `work` run in its turn, while the model is usable. See WorkQueue.submit."""
        self._description.check_usable()

        async def run(values: Any) -> T | Unsettled[T]:
            # Again: the model may have failed while the request waited.
            self._description.check_usable()
            return await work(values)

        return self._queue.submit(call, tensors, run, failed, limited=limited, counted=counted)

    def _begin(
        self, call: Call, tensors: Any, work: Callable[[Any, int], Awaitable[T]], deliver: Deliver[T] | None
    ) -> Job[T]:
        submitted = time.monotonic()

        async def apply(values: Any) -> T | Unsettled[T]:
            return await self.apply(call, job, values, work, deliver, time.monotonic() - submitted)

        job = self.take_turn(call, tensors, apply, self._description.met)
        self.log.add(call, job)
        job.on_end(lambda _: self.log.settle(call))
        return job

    async def apply(
        self,
        call: Call,
        job: Job[T],
        values: Any,
        work: Callable[[Any, int], Awaitable[T]],
        deliver: Deliver[T] | None,
        queue: float,
        recovery_before: float = 0.0,
    ) -> T | Unsettled[T]:
        """Carry out a command in its turn. `queue`: the seconds that it waited for that, and `recovery_before` for lost
        ranks.
        """
        # All that can be refused for want of room is refused here, before the model changes.
        await self._records.usable()
        uploads = await self._records.keep(job.uploads)

        def try_once() -> Awaitable[T]:
            self._splits = self._ranks.workers.splits
            return work(values, self.number + 1)

        try:
            self._records.reserve(len(call.raw) + room_for_reply(call.method), uploads)
            result, recovery = await self._ranks.run(try_once, changes=True, request_id=call.request_id)
        except GradwireError as error:
            if error.outcome == "applied" or error.reason == "COMMAND_KILLS_RANKS":
                return await self.end_with(error, call, job, uploads)
            self._records.drop(uploads)
            raise
        except BaseException:
            self._records.drop(uploads)
            raise
        self._description.applied(result)
        try:
            result = result if deliver is None else await deliver(result)
            result = with_times(result, call, queue, recovery_before + recovery)
            reply = job.reply = stored_reply(call.method, result)
        except Exception as error:
            refusal = public_error(error, call.request_id)
            refusal.outcome = "applied"
            return await self.end_with(refusal, call, job, uploads)
        settled = await self._record(call, job, uploads, reply)
        return result if settled is None else Unsettled(result, settled)

    async def end_with(
        self, error: GradwireError, call: Call, job: Job[T], uploads: Sequence[StoredUpload]
    ) -> Unsettled[T]:
        """Record a command that ends with `error`: it was applied and has no reply, or must never be tried again."""
        refused = error.message if error.reason == "COMMAND_KILLS_RANKS" else None
        settled = await self._record(call, job, uploads, None, refused)
        if settled is None:
            raise error
        self._description.met(error)
        return Unsettled(None, settled, error)

    async def _record(
        self,
        call: Call,
        job: Job[Any],
        uploads: Sequence[StoredUpload],
        reply: bytes | None,
        refused: str | None = None,
    ) -> asyncio.Future[None] | None:
        """Number the command that was applied and put it into the journal. None: it outlives what it should."""
        # Only these have numbers: what was refused leaves no trace, in random numbers neither.
        self.number += 1
        error = None if refused is None else kills_ranks(refused)
        self.log.store(call, EndedCommand(self.number, call.method, reply, error))
        if reply is not None:
            self.log.weigh(call, len(reply))
        self._applied()
        entry = Entry(
            number=self.number,
            method=call.method,
            request=call.raw,
            reply=reply,
            request_id=call.request_id,
            body=call.body,
            body_checks=True,
            refused=refused,
            uploads=tuple(uploads),
            released=self._released(),
            splits={name: each for name, each in self._ranks.workers.splits.items() if self._splits.get(name) != each},
        )
        await self._records.write(entry)
        return self._records.append(entry, job)

    def record_steps(self, jobs: Sequence[StepJob], results: Sequence[StepResult]) -> list[asyncio.Future[None] | None]:
        """Number steps that were applied and put them into the journal together; for each as `_record`."""
        entries: list[Entry] = []
        for job, result in zip(jobs, results, strict=True):
            call, reply = job.call, stored_reply("TrainStep", result)
            job.reply = reply
            self.number += 1
            self.log.store(call, EndedCommand(self.number, call.method, reply))
            if reply is not None:
                self.log.weigh(call, len(reply))
            entry = Entry(
                number=self.number,
                method=call.method,
                request=call.raw,
                reply=reply,
                request_id=call.request_id,
                body=call.body,
                body_checks=True,
                released=() if entries else self._released(),
            )
            entries.append(entry)
        self._applied()
        return self._records.append_all(entries, jobs)

    async def _run_again(
        self, call: Call, tensors: Any, work: Callable[[Any, int], Awaitable[T]], deliver: Deliver[T] | None
    ) -> T:
        assert call.replay is not None
        self._ranks.workers.expect(call.replay.splits)
        result = await work(resolve(tensors, call.replay.uploads), call.replay.number)
        self._description.applied(result)
        self.number = call.replay.number
        if deliver is None:
            return result
        return await deliver(result) if call.replay.answered else without_tensors(result)


def _is_unknown(request: Job[Any] | EndedCommand) -> bool:
    return request.error is not None and request.error.outcome == "unknown"
