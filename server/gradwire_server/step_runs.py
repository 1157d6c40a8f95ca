"""Training steps of streams: those that wait one behind the other in a model's queue run in one turn, together.

Each is a command as if it had come alone: once for its request id, numbered, and in the journal before it is answered.
Ranks are handed as many at once as can go together; what was not applied when one failed runs again, alone where ranks
were lost, so that a step that kills its ranks is found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any

from gradwire_proto.batch_form import FormedStep
from gradwire_proto.errors import Cancelled, GradwireError
from gradwire_proto.values import Batch, StepResult
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.live_ranks import LiveRanks, Wait
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_records import AHEAD_BYTES, ModelRecords
from gradwire_server.step_jobs import Chain, LoneStep, StepJob, behind_refused
from gradwire_server.steps_together import StepsTogether
from gradwire_server.stored_replies import EndedCommand, room_for_reply
from gradwire_server.tensors.uploads import Uploads
from gradwire_server.work_queue import Job, Unsettled, WorkQueue

MOST_STEPS, MOST_BYTES = 64, 8 << 20
"""How many steps, and bytes of requests, go to the ranks together at most."""


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
                if chain.refuses(place):
                    raise behind_refused()  # One before it was undone when the journal was mended, or ranks were lost.
                return self._step_alone(step, values, number)

            return await self._commands.apply(call, job, job.waited, values, work)

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
            wait=Wait(self._ranks),
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
        return await StepsTogether(self._commands, self._ranks, self._description, jobs).run()
