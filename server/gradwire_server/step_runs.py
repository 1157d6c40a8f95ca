"""Training steps: those that come one behind the other in a model's queue run in one turn, together.

Each is a command as if it had come alone: once for its request id, numbered, and in the journal before it is answered.
Ranks are handed as many at once as can go together, and more while they are at those; what was not applied when one
failed runs again, alone where ranks were lost, so that a step that kills its ranks is found.
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
from gradwire_server.model_records import ModelRecords, takes_long
from gradwire_server.step_jobs import Chain, LoneStep, StepJob, behind_refused
from gradwire_server.steps_together import StepsTogether
from gradwire_server.stored_replies import EndedCommand, room_for_reply
from gradwire_server.tensors.uploads import Uploads
from gradwire_server.work_queue import Job, Unsettled, WorkQueue

MOST_STEPS, MOST_BYTES = 64, 8 << 20
"""How many steps, and bytes of requests, go to the ranks together at most."""


class _Run:
    """The steps of one turn, which may still come while it runs: `jobs` are those that wait. `turn` is the turn's place
    in the queue, `together` what the ranks are at.
    """

    def __init__(self, first: StepJob) -> None:
        self.jobs: deque[StepJob] = deque([first])
        self.turn: Job[None] | None = None
        self.together: StepsTogether | None = None

    def add(self, job: StepJob) -> None:
        """One more, behind all."""
        self.jobs.append(job)
        if self.together is not None:
            self.together.extend_soon()

    def next(self) -> StepJob | None:
        """The first that waits; those before it, which do not any more, are left out."""
        while self.jobs:
            job = self.jobs[0]
            if job.chain.refuses(job.place):
                job.refuse(behind_refused())
            job.expire()
            if job.waits:
                return job
            self.jobs.popleft()
        return None

    def over(self, turn: Job[None]) -> None:
        """The turn has ended, or will never begin: so will the steps that were not begun."""
        self.refuse(turn.error or Cancelled("the service stopped"))

    def refuse(self, error: GradwireError) -> None:
        """End the steps that wait with this error."""
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
        self._running: _Run | None = None

    async def submit(
        self, call: Call, step: FormedStep | LoneStep, chain: Chain, place: int, *, at_once: bool = False
    ) -> Job[Any] | EndedCommand:
        """Let a step run behind all that came before; of one that was seen before, what became of it. at_once: no other
        comes with it.

        Raises what `Commands.run` raises before the step is in the queue.
        """
        found = self._commands.log.find(call)
        if found is not None and found.error is not None and found.error.outcome == "unknown":
            await self._records.try_to_mend()
            found = self._commands.log.find(call)
        if found is None:
            return self._begin(call, step, chain, place, at_once)
        if isinstance(found, Job):
            chain.joined(place, found)
        return found

    def refuse(self, error: GradwireError) -> None:
        """End the steps that wait in a turn which runs with this error."""
        if self._running is not None:
            self._running.refuse(error)

    def _begin(self, call: Call, step: FormedStep | LoneStep, chain: Chain, place: int, at_once: bool) -> StepJob:
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
            wait=Wait(self._ranks),
            formed=step if isinstance(step, FormedStep) and not takes_long(len(call.raw)) else None,
            chain=chain,
            place=place,
        )
        job.on_end(lambda _: self._ended(call))
        self._commands.log.add(call, job)
        self._place(job, at_once)
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
        flow = workers.step_flow(results.extend)
        flow.send([step], command=number)
        await flow.ended()
        return results[0]

    def _place(self, job: StepJob, at_once: bool) -> None:
        """Let it run in the queue's last turn, where that is one of steps, or else in a new one."""
        run = self._last
        if run is not None and run.turn is not None and self._queue.is_last(run.turn):
            run.add(job)
            return
        run = self._last = _Run(job)

        async def turn(_: Any) -> None | Unsettled[None]:
            return await self._carry_out(run)

        run.turn = self._commands.take_turn(Call(), None, turn, limited=False, counted=False, at_once=at_once)
        run.turn.on_end(run.over)

    # --- the turn -------------------------------------------------------------------------------------------------

    async def _carry_out(self, run: _Run) -> None | Unsettled[None]:
        self._running, alone = run, 0
        try:
            while run.next() is not None:
                self._description.check_usable()
                if not alone and (together := await self._first_together(run)):
                    alone = await self._run_together(run, together)
                elif (job := run.next()) is not None:
                    run.jobs.popleft()
                    alone -= alone > 0
                    await job.run()
                    if job.has_failed:
                        job.chain.refused(job.place)
        finally:
            # Whoever comes now takes another turn.
            self._last, self._running = None if self._last is run else self._last, None
        unsettled = self._records.unsettled
        return None if unsettled is None else Unsettled(None, unsettled)

    async def _first_together(self, run: _Run) -> list[StepJob]:
        """The first of those that wait which the ranks can be handed at once; none: the first goes alone."""
        try:
            await self._records.usable()
            return self._next_together(run, ())
        except GradwireError:
            return []

    async def _run_together(self, run: _Run, jobs: Sequence[StepJob]) -> int:
        """Apply these, and what comes meanwhile; how many are to run again, each alone: ranks were lost, and are
        back.
        """

        def more(at_ranks: Sequence[StepJob]) -> list[StepJob]:
            try:
                self._description.check_usable()
                return self._next_together(run, at_ranks)
            except GradwireError:
                return []

        run.together = StepsTogether(self._commands, self._ranks, self._description, run.jobs, more)
        try:
            rest, lost = await run.together.run(jobs)
        finally:
            run.together = None
        run.jobs.extendleft(reversed(rest))
        if lost is None:
            return 0
        if len(rest) == 1:
            # Nobody else was with the ranks.
            rest[0].kills += lost.outcome != "not_applied"
        return sum(job.waits for job in rest)

    def _next_together(self, run: _Run, at_ranks: Sequence[StepJob]) -> list[StepJob]:
        """The next steps that can go together, which wait in `run` no more.

        All that can be refused for want of room is refused here, before the model changes: there is room for records of
        these beside those of the steps that are with the ranks. Raises why there is none.
        """
        chosen: list[StepJob] = []
        nbytes = 0
        while len(chosen) < MOST_STEPS and (job := run.next()) is not None:
            nbytes += len(job.call.raw)
            if job.formed is None or (chosen and nbytes > MOST_BYTES):
                break
            chosen.append(run.jobs.popleft())
        if not chosen:
            return []
        try:
            count = self._ranks.workers.together([job.formed for job in chosen if job.formed is not None])
            self._records.reserve(_room([*at_ranks, *chosen[:count]]), ())
        except BaseException:
            run.jobs.extendleft(reversed(chosen))
            raise
        run.jobs.extendleft(reversed(chosen[count:]))
        return chosen[:count]


def _room(jobs: Sequence[StepJob]) -> int:
    """Bytes that the requests and replies of these have together at most."""
    return sum(len(job.call.raw) for job in jobs) + len(jobs) * room_for_reply("TrainStep")
