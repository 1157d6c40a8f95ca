"""How the requests of one model run: in turn, each command once, numbered, and in the journal before it is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import SplitDecision, StepResult, StepsResult
from gradwire_server.calls import Call
from gradwire_server.failures import public_error
from gradwire_server.live_ranks import LiveRanks, Wait
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_records import ModelRecords
from gradwire_server.replies import with_times, without_tensors
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.dataset_files import StoredDataset
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
        self._on_undone: list[Callable[[int], None]] = []
        self._splits: Mapping[str, SplitDecision] = {}
        """How batches were spread before the command that runs."""

    async def run(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any, int], Awaitable[T]],
        deliver: Deliver[T] | None = None,
        *,
        dataset: StoredDataset | None = None,
    ) -> T:
        """Run `work(tensors, number)` once for the request id of `call`. A repeat waits for it, or gets its reply.

        dataset: what `work` goes through, whose bytes its record needs.
        """
        if call.replay is not None:
            return await self._run_again(call, tensors, work, deliver)
        request = await self._find(call)
        if request is None:
            request = self._begin(call, tensors, work, deliver, dataset)
        return await request.result(call.deadline)

    async def join(self, call: Call) -> Any:
        """The reply to the request that `call` repeats; None where it must be asked for as a new one."""
        request = await self._find(call)
        return None if request is None else await request.result(call.deadline)

    async def _find(self, call: Call) -> Job[Any] | EndedCommand | None:
        request = self.log.find(call)
        if request is None or not _is_unknown(request):
            return request
        await self._records.try_to_mend()
        return self.log.find(call)

    def on_undone(self, callback: Callable[[int], None]) -> None:
        """Have `callback(number)` called when the commands behind that number are undone, before others run."""
        self._on_undone.append(callback)

    def goes_back_to(self, number: int) -> None:
        """Commands behind this number are undone."""
        self.log.goes_back_to(number)
        for callback in self._on_undone:
            callback(number)

    def is_settled(self, request_id: str) -> bool:
        """Whether a request with that id is known, and what became of it if it has ended."""
        if request_id not in self.log:
            return False
        request = self.log.get(request_id)
        return request is None or not _is_unknown(request)

    async def seen(self, request_id: str) -> Job[Any] | EndedCommand | None:
        """The request with that id, settled where it can be. See RequestLog.get."""
        request = self.log.get(request_id)
        if request is None or not _is_unknown(request):
            return request
        await self._records.try_to_mend()
        return self.log.get(request_id)

    async def read(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any], Awaitable[T]],
        *,
        limited: bool = True,
        at_once: bool = False,
    ) -> T:
        """Run `work(tensors)`, which changes nothing, in its turn. at_once: see `begin`."""
        return await self.begin(call, tensors, work, limited=limited, at_once=at_once).result(call.deadline)

    def begin(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any], Awaitable[T]],
        *,
        limited: bool = True,
        at_once: bool = False,
    ) -> Job[T]:
        """Let `work(tensors)`, which changes nothing, run in its turn. limited, at_once: see WorkQueue.submit.

        Where the deadline has passed already, it does not begin at once: the queue refuses it.
        """
        at_once = at_once and (call.deadline is None or call.deadline > time.monotonic())
        wait = Wait(self._ranks)

        async def look(values: Any) -> T | Unsettled[T]:
            wait.turn_begins()
            result = await self._ranks.run(lambda: work(values), changes=False)
            seen = self.number
            # Of a journal that is broken nothing outlives what it should before it is mended.
            await self._records.usable()
            if self.number < seen:
                result = await self._ranks.run(lambda: work(values), changes=False)
            result = with_times(result, call, wait.queue, wait.recovery)
            # What was seen must outlive what the commands before outlive.
            return result if self._records.unsettled is None else Unsettled(result, self._records.unsettled)

        return self.take_turn(call, tensors, look, limited=limited, at_once=at_once)

    def take_turn(
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
        """Let `work` run in its turn, while the model is usable. See WorkQueue.submit."""
        self._description.check_usable()

        async def run(values: Any) -> T | Unsettled[T]:
            # Again: the model may have failed while the request waited.
            self._description.check_usable()
            return await work(values)

        return self._queue.submit(call, tensors, run, failed, limited=limited, counted=counted, at_once=at_once)

    def _begin(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any, int], Awaitable[T]],
        deliver: Deliver[T] | None,
        dataset: StoredDataset | None,
    ) -> Job[T]:
        wait = Wait(self._ranks)

        async def apply(values: Any) -> T | Unsettled[T]:
            return await self.apply(call, job, wait, values, work, deliver, dataset)

        job = self.take_turn(call, tensors, apply, self._description.met)
        self.log.add(call, job)
        job.on_end(lambda _: self.log.settle(call))
        return job

    async def apply(
        self,
        call: Call,
        job: Job[T],
        wait: Wait,
        values: Any,
        work: Callable[[Any, int], Awaitable[T]],
        deliver: Deliver[T] | None = None,
        dataset: StoredDataset | None = None,
    ) -> T | Unsettled[T]:
        """Carry out a command, whose turn begins."""
        wait.turn_begins()
        # All that can be refused for want of room is refused here, before the model changes.
        await self._records.usable()
        uploads = await self._records.keep(job.uploads, dataset)

        def try_once() -> Awaitable[T]:
            self._splits = self._ranks.workers.splits
            return work(values, self.number + 1)

        try:
            self._records.reserve(len(call.raw) + room_for_reply(call.method), uploads)
            result = await self._ranks.run(try_once, changes=True, request_id=call.request_id, kills=job.kills)
        except GradwireError as error:
            if error.outcome == "applied":
                return await self.end_with(error, call, job, uploads, self._description.step)
            self._records.drop(uploads)
            if error.reason == "COMMAND_KILLS_RANKS":
                return await self._refuse_for_good(error, call, job)
            raise
        except BaseException:
            self._records.drop(uploads)
            raise
        before = self._description.step
        self._description.applied(result)
        commands = result.commands if isinstance(result, StepsResult) else 1
        try:
            result = result if deliver is None else await deliver(result)
            result = with_times(result, call, wait.queue, wait.recovery)
            reply = job.reply = stored_reply(call.method, result)
        except Exception as error:
            return await self.end_with(_after_applied(error, call), call, job, uploads, before, commands)
        settled = await self._record(call, job, uploads, reply, commands=commands)
        self._description.settles(settled, before)
        return result if settled is None else Unsettled(result, settled)

    async def end_with(
        self,
        error: GradwireError,
        call: Call,
        job: Job[T],
        uploads: Sequence[StoredUpload],
        before: int,
        commands: int = 1,
    ) -> Unsettled[T]:
        """Record a command that was applied, and has an error in place of a reply. before: the step before it."""
        settled = await self._record(call, job, uploads, None, commands=commands)
        self._description.settles(settled, before)
        return self._ended(error, settled)

    async def _refuse_for_good(self, error: GradwireError, call: Call, job: Job[T]) -> Unsettled[T]:
        """Record a command that must never be tried again. It takes no number, and nothing of its request is needed."""
        self.log.store(call, EndedCommand(self.number, call.method, None, kills_ranks(error.message)))
        entry = Entry(
            number=self.number,
            method=call.method,
            request=b"",
            reply=None,
            request_id=call.request_id,
            body=call.body,
            refused=error.message,
            unnumbered=True,
            released=self._released(),
        )
        return self._ended(error, self._records.append(entry, job))

    def _ended(self, error: GradwireError, settled: asyncio.Future[None] | None) -> Unsettled[Any]:
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
        *,
        commands: int = 1,
    ) -> asyncio.Future[None] | None:
        """Number the command that was applied and put it into the journal. None: it outlives what it should."""
        # Only these have numbers: what was refused leaves no trace, in random numbers neither.
        self.number += commands
        self.log.store(call, EndedCommand(self.number, call.method, reply))
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
            body_checks=call.body_checks,
            commands=commands,
            uploads=tuple(uploads),
            released=self._released(),
            splits={name: each for name, each in self._ranks.workers.splits.items() if self._splits.get(name) != each},
        )
        await self._records.write(entry)
        return self._records.append(entry, job)

    def record_steps(self, jobs: Sequence[StepJob], results: Sequence[StepResult]) -> list[asyncio.Future[None] | None]:
        """Number steps that were applied and put them into the journal together; for each as `_record`.

        `recorded` must follow in the same turn of the event loop.
        """
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
        return self._records.append_all(entries, jobs)

    def recorded(self) -> None:
        """Steps were recorded, and who waits for them has been told."""
        self._applied()

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
        if not call.replay.answered:
            return without_tensors(result)
        try:
            return await deliver(result)
        except Exception as error:
            # No room for the answer is no reason not to come back: it is not known, then.
            raise _after_applied(error, call) from error


def _after_applied(error: Exception, call: Call) -> GradwireError:
    """What a client hears of an error that came when its command had been applied."""
    refusal = public_error(error, call.request_id)
    refusal.outcome = "applied"
    return refusal


def _is_unknown(request: Job[Any] | EndedCommand) -> bool:
    return request.error is not None and request.error.outcome == "unknown"
