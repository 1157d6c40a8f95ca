"""Training steps of streams: those that wait one behind the other in a model's queue run in one turn, together.

Each is a command as if it had come alone: once for its request id, numbered, and in the journal before it is answered.
Ranks are handed as many at once as can go together; what was not applied when one failed runs again, alone where ranks
were lost, so that a step that kills its ranks is found.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from gradwire_proto.batch_form import FormedStep
from gradwire_proto.errors import Cancelled, FailedPrecondition, GradwireError
from gradwire_proto.values import Batch, StepResult
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.failures import public_error
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_records import AHEAD_BYTES, ModelRecords
from gradwire_server.replies import with_times
from gradwire_server.stored_replies import EndedCommand, room_for_reply
from gradwire_server.tensors.uploads import Claim, Uploads
from gradwire_server.work_queue import Job, Unsettled, WorkQueue

MOST_STEPS, MOST_BYTES = 64, 8 << 20
"""How many steps, and bytes of requests, go to the ranks together at most."""


@dataclass(frozen=True, slots=True)
class LoneStep:
    """A step some of whose tensors travel apart."""

    batch: Batch
    lr: float | None


class Chain:
    """The steps of one stream, which have places in it: once one was refused, those behind it are refused too."""

    def __init__(self) -> None:
        self._refused: float = inf
        self._joined: list[tuple[int, Job[Any]]] = []

    def refuses(self, place: float) -> bool:
        """Whether a step before this place was refused."""
        return self._refused < place or any(before < place and job.has_failed for before, job in self._joined)

    def refused(self, place: int) -> None:
        """The step at this place was refused."""
        self._refused = min(self._refused, place)

    def joined(self, place: int, job: Job[Any]) -> None:
        """The step at this place is a request of somebody else, which it repeats."""
        self._joined = [each for each in self._joined if each[1].has_failed or not each[1].ended]
        self._joined.append((place, job))


def behind_refused() -> GradwireError:
    """The error of a step behind one that was refused."""
    return FailedPrecondition(
        "a step before this one in its stream was refused, so this one was not tried",
        reason="STEP_BEFORE_REFUSED",
        retryable=True,
    )


class StepJob(Job[StepResult]):
    """A step that waits, runs or has ended: at `place` in `chain`.

    `formed`: None where it must go to the ranks alone.
    `recovery`: the seconds that it waited already for ranks that were lost. `ended_first` is called at its end, before
    all others.
    """

    def __init__(
        self,
        call: Call,
        claim: Claim[Any],
        work: Callable[[Any], Awaitable[StepResult | Unsettled[StepResult]]],
        failed: Callable[[GradwireError], None],
        ended_first: Callable[[Call], None],
        *,
        formed: FormedStep | None,
        chain: Chain,
        place: int,
    ) -> None:
        super().__init__(call, claim, work, failed)
        self.call = call
        self.formed = formed
        self.chain = chain
        self.place = place
        self.submitted = time.monotonic()
        self.recovery = 0.0
        self._ended_first = ended_first
        self._watchers: list[Callable[[], None]] = []

    def watch(self, callback: Callable[[], None]) -> None:
        """Have `callback` called at the end, at once: sooner than by `on_end`, which takes a turn of the loop."""
        self._watchers.append(callback)

    async def wait(self) -> None:
        """Wait for the end; sooner than by the future of all jobs, whose callbacks take turns of the loop."""
        if self.ended:
            return
        waiter = asyncio.get_running_loop().create_future()
        self.watch(lambda: None if waiter.done() else waiter.set_result(None))
        await waiter

    def _end(self) -> None:
        super()._end()
        self._ended_first(self.call)
        for callback in self._watchers:
            callback()


class _Run:
    """The steps of one turn. `turn` is the turn's place in the queue."""

    def __init__(self) -> None:
        self.jobs: list[StepJob] = []
        self.turn: Job[None] | None = None

    def over(self, turn: Job[None]) -> None:
        """The turn has ended, or will never begin: so will the steps that were not begun."""
        error = turn.error or Cancelled("the service stopped")
        for job in self.jobs:
            job.refuse(error)


class StepRuns:
    """See the module."""

    def __init__(
        self,
        description: ModelDescription,
        queue: WorkQueue,
        commands: Commands,
        ranks: LiveRanks,
        records: ModelRecords,
        uploads: Uploads,
    ) -> None:
        self._description = description
        self._queue = queue
        self._commands = commands
        self._ranks = ranks
        self._records = records
        self._uploads = uploads
        self._last: _Run | None = None

    async def submit(
        self, call: Call, step: FormedStep | LoneStep, chain: Chain, place: int
    ) -> Job[Any] | EndedCommand:
        """Let a step run behind all that came before; of one that was seen before, what became of it.

        Raises what `Commands.run` raises before the step is in the queue.
        """
        found = self._commands.log.find(call)
        if found is not None and found.error is not None and found.error.outcome == "unknown":
            await self._records.try_to_mend()
            found = self._commands.log.find(call)
        if found is None:
            return self._begin(call, step, chain, place)
        if isinstance(found, Job):
            chain.joined(place, found)
        return found

    def _begin(self, call: Call, step: FormedStep | LoneStep, chain: Chain, place: int) -> StepJob:
        self._description.check_usable()
        self._queue.enter()

        async def alone(values: Any) -> StepResult | Unsettled[StepResult]:
            self._description.check_usable()

            def work(_: Any, number: int) -> Awaitable[StepResult]:
                return self._step_alone(step, values, number)

            queue = time.monotonic() - job.submitted
            return await self._commands.apply(call, job, values, work, None, None, queue, job.recovery)

        tensors = None
        if isinstance(step, LoneStep):
            tensors = {"batch": {"inputs": step.batch.inputs, "targets": step.batch.targets}}
        try:
            claim = self._uploads.claim(tensors)
        except GradwireError:
            self._queue.leave()
            raise
        job = StepJob(
            call,
            claim,
            alone,
            self._description.met,
            self._ended,
            formed=step if isinstance(step, FormedStep) and len(call.raw) <= AHEAD_BYTES else None,
            chain=chain,
            place=place,
        )
        self._run_to_join().jobs.append(job)
        self._commands.log.add(call, job)
        return job

    def _ended(self, call: Call) -> None:
        self._queue.leave()
        self._commands.log.settle(call)

    async def _step_alone(self, step: FormedStep | LoneStep, values: Any, number: int) -> StepResult:
        workers = self._ranks.workers
        if isinstance(step, LoneStep):
            return await workers.train_step(Batch(**values["batch"]), command=number, lr=step.lr)
        if not workers.together([step]):
            return await workers.train_step(step.form.batch(step.data), command=number, lr=step.lr)
        results: list[StepResult] = []
        await workers.train_steps([step], command=number, took=results.extend)
        return results[0]

    def _run_to_join(self) -> _Run:
        """The last one of the queue, or else a new one."""
        run = self._last
        if run is not None and run.turn is not None and self._queue.is_last(run.turn):
            return run
        run = _Run()

        async def turn(_: Any) -> None | Unsettled[None]:
            return await self._carry_out(run)

        run.turn = self._commands.take_turn(Call(), None, turn, limited=False, counted=False)
        run.turn.on_end(run.over)
        self._last = run
        return run

    # --- the turn -------------------------------------------------------------------------------------------------

    async def _carry_out(self, run: _Run) -> None | Unsettled[None]:
        self._last = None if self._last is run else self._last
        waiting, alone = deque(run.jobs), 0
        while waiting:
            job = waiting[0]
            if job.chain.refuses(job.place):
                job.refuse(behind_refused())
            job.expire()
            if not job.waits:
                waiting.popleft()
                continue
            self._description.check_usable()
            together = [] if alone else self._together(waiting)
            if len(together) > 1:
                alone = await self._run_together(together)
                continue
            waiting.popleft()
            alone -= alone > 0
            await job.run()
            if job.has_failed:
                job.chain.refused(job.place)
        unsettled = self._records.unsettled
        return None if unsettled is None else Unsettled(None, unsettled)

    def _together(self, waiting: Sequence[StepJob]) -> list[StepJob]:
        """The first of those that wait which the ranks can be handed at once; one or none: the first goes alone."""
        chosen: list[StepJob] = []
        nbytes = 0
        for job in waiting:
            job.expire()
            if not job.waits or job.chain.refuses(job.place):
                continue
            nbytes += len(job.call.raw)
            if job.formed is None or len(chosen) == MOST_STEPS or (chosen and nbytes > MOST_BYTES):
                break
            chosen.append(job)
        steps = [job.formed for job in chosen if job.formed is not None]
        return chosen[: self._ranks.workers.together(steps)] if steps else []

    async def _run_together(self, jobs: Sequence[StepJob]) -> int:
        """Apply these; how many are to run again, each alone: ranks were lost, and are back."""
        try:
            await self._records.usable()
            # All that can be refused for want of room is refused here, before the model changes.
            room = sum(len(job.call.raw) for job in jobs) + len(jobs) * room_for_reply("TrainStep")
            self._records.reserve(room, ())
        except GradwireError:
            # There may be room for some of them.
            return len(jobs)
        # Some may have been given up meanwhile.
        jobs = [job for job in jobs if job.waits]
        return await _Together(self._commands, self._ranks, self._records, self._description, jobs).run()


class _Together:
    """Steps that are with the ranks at once. `jobs`: all of them; `_done`: how many were applied."""

    def __init__(
        self,
        commands: Commands,
        ranks: LiveRanks,
        records: ModelRecords,
        description: ModelDescription,
        jobs: Sequence[StepJob],
    ) -> None:
        self._commands = commands
        self._ranks = ranks
        self._records = records
        self._description = description
        self._jobs = jobs
        self._steps = [job.formed for job in jobs if job.formed is not None]
        self._lost = 0.0
        self._done = 0
        self._began = time.monotonic()
        self._recovery = 0.0

    async def run(self) -> int:
        """Apply them; how many must run again, each alone."""
        for job in self._jobs:
            job.begin()
        try:
            self._lost = await self._ranks.run_together(self._work)
        except Exception as error:
            await self._fail(error)
        except BaseException:
            for job in self._jobs[self._done :]:
                job.cut()
            raise
        rest = self._jobs[self._done :]
        for job in rest:
            job.put_back()
        if not self._lost:
            return 0
        if rest:
            rest[0].recovery = self._lost
        return len(rest)

    async def _work(self, recovery: float) -> None:
        self._recovery = recovery
        workers = self._ranks.workers
        # Other ranks than those that were asked before, where some were lost since.
        steps = self._steps[: workers.together(self._steps)]
        if steps:
            await workers.train_steps(steps, command=self._commands.number + 1, took=self._took)

    def _took(self, results: Sequence[StepResult]) -> None:
        """The next steps were applied by all ranks: record and answer them."""
        jobs = self._jobs[self._done : self._done + len(results)]
        self._ranks.caught_up()
        told = [
            with_times(result, job.call, max(0.0, self._began - job.submitted), self._recovery)
            for job, result in zip(jobs, results, strict=True)
        ]
        self._done += len(jobs)
        self._recovery = 0.0
        before = self._description.info.step
        self._description.applied(results[-1])
        settled = self._commands.record_steps(jobs, told)
        # None of them outlives what it should later than the last.
        self._description.settles(settled[-1], before)
        for job, result, its in zip(jobs, told, settled, strict=True):
            job.take(result if its is None else Unsettled(result, its))

    async def _fail(self, error: Exception) -> None:
        """The next step ends with this error; those behind it were not begun."""
        job = self._jobs[self._done]
        self._done += 1
        job.chain.refused(job.place)
        refusal = public_error(error, job.call.request_id, outcome="unknown")
        if refusal.outcome != "applied":
            job.fail(refusal)
            return
        try:
            job.take(await self._commands.end_with(refusal, job.call, job, (), self._description.info.step))
        except GradwireError as told:
            job.fail(told)
