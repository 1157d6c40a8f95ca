"""Training steps that the ranks are handed at once: each recorded and answered as soon as it is applied."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import StepResult
from gradwire_server.commands import Commands
from gradwire_server.failures import public_error
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_description import ModelDescription
from gradwire_server.replies import with_times
from gradwire_server.step_jobs import StepJob
from gradwire_server.work_queue import Unsettled


class StepsTogether:
    """Steps that are with the ranks at once. `jobs`: all of them; `_done`: how many were applied."""

    def __init__(
        self,
        commands: Commands,
        ranks: LiveRanks,
        description: ModelDescription,
        jobs: Sequence[StepJob],
    ) -> None:
        self._commands = commands
        self._ranks = ranks
        self._description = description
        self._jobs = jobs
        self._steps = [job.formed for job in jobs if job.formed is not None]
        self._kept_ranks = True
        self._done = 0

    async def run(self) -> int:
        """Apply them; how many must run again, each alone."""
        for job in self._jobs:
            job.begin()
            job.waited.turn_begins()
        try:
            self._kept_ranks = await self._ranks.run_together(self._work)
        except Exception as error:
            await self._fail(error)
        except BaseException:
            for job in self._jobs[self._done :]:
                job.cut()
            raise
        rest = self._jobs[self._done :]
        for job in rest:
            job.put_back()
        return 0 if self._kept_ranks else sum(job.waits for job in rest)

    async def _work(self) -> None:
        if any(job.chain.refuses(job.place) for job in self._jobs):
            return  # Steps before them were undone meanwhile: others go together then.
        workers = self._ranks.workers
        # Other ranks than those that were asked before, where some were lost since.
        steps = self._steps[: workers.together(self._steps)]
        if steps:
            await workers.train_steps(steps, command=self._commands.number + 1, took=self._took)

    def _took(self, results: Sequence[StepResult]) -> None:
        """The next steps were applied: record and answer them."""
        jobs = self._jobs[self._done : self._done + len(results)]
        self._ranks.caught_up()
        told = [
            with_times(result, job.call, job.waited.queue, job.waited.recovery)
            for job, result in zip(jobs, results, strict=True)
        ]
        before = self._description.info.step
        self._description.applied(results[-1])
        settled = self._commands.record_steps(jobs, told)
        # None of them outlives what it should later than the last.
        self._description.settles(settled[-1], before)
        for job, result, its in zip(jobs, told, settled, strict=True):
            job.take(result if its is None else Unsettled(result, its))
        self._done += len(jobs)

    async def _fail(self, error: Exception) -> None:
        """The next step ends with this error; those behind it were not begun."""
        job = next((each for each in self._jobs[self._done :] if not each.ended), None)
        if job is None:
            return
        self._done = self._jobs.index(job) + 1
        job.chain.refused(job.place)
        refusal = public_error(error, job.call.request_id, outcome="unknown")
        if refusal.outcome != "applied":
            job.fail(refusal)
            return
        try:
            job.take(await self._commands.end_with(refusal, job.call, job, (), self._description.info.step))
        except GradwireError as told:
            job.fail(told)
