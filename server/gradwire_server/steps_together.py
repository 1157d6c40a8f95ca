"""Training steps that the ranks are handed together: each recorded and answered as soon as it is applied.

While the ranks are at some, they are handed those that come meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence, Sized

from gradwire_proto.batch_form import FormedStep
from gradwire_proto.errors import GradwireError, RankLost
from gradwire_proto.values import StepResult
from gradwire_server.commands import Commands
from gradwire_server.failures import public_error
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_description import ModelDescription
from gradwire_server.replies import with_times
from gradwire_server.step_jobs import StepJob
from gradwire_server.work_queue import Unsettled
from gradwire_server.workers import StepFlow

More = Callable[[Sequence[StepJob]], list[StepJob]]
"""Takes the steps that are with the ranks; gives the next ones, for whose records there is room beside theirs."""


class StepsTogether:
    """Steps that are with the ranks: `_jobs`, in order, those that are applied left out. `waiting`: what `more` gives
    comes of it.
    """

    def __init__(
        self,
        commands: Commands,
        ranks: LiveRanks,
        description: ModelDescription,
        waiting: Sized,
        more: More,
    ) -> None:
        self._commands = commands
        self._ranks = ranks
        self._description = description
        self._waiting = waiting
        self._more = more
        self._jobs: deque[StepJob] = deque()
        self._flow: StepFlow | None = None
        """Where more can be sent."""
        self._extends_soon = False

    async def run(self, jobs: Sequence[StepJob]) -> tuple[list[StepJob], RankLost | None]:
        """Apply these, and more. Those that must run again, and wait; how ranks were lost, which are back, if any."""
        self._begin(jobs)
        lost = None
        try:
            lost = await self._ranks.run_together(self._work)
        except Exception as error:
            await self._fail(error)
        except BaseException:
            for job in self._jobs:
                job.cut()
            raise
        for job in self._jobs:
            job.put_back()
        return list(self._jobs), lost

    def extend_soon(self) -> None:
        """More wait. Not at once: others may come with them."""
        if self._flow is not None and self._flow.has_room and not self._extends_soon:
            self._extends_soon = True
            asyncio.get_running_loop().call_soon(self._extend)

    def _begin(self, jobs: Sequence[StepJob]) -> None:
        for job in jobs:
            job.begin()
            job.waited.turn_begins()
        self._jobs.extend(jobs)

    async def _work(self) -> None:
        if any(job.chain.refuses(job.place) for job in self._jobs):
            return  # Steps before them were undone meanwhile: others go together then.
        workers, steps = self._ranks.workers, _formed(self._jobs)
        # Other ranks than those that were asked before, where some were lost since.
        count = workers.together(steps)
        if not count:
            return
        flow = workers.step_flow(self._took)
        flow.send(steps[:count], command=self._commands.number + 1)
        if count == len(steps):
            self._flow = flow
        try:
            await flow.ended()
        except Exception as error:
            # A defect, too, is the doing of the first that is not applied.
            request_id = self._jobs[0].call.request_id if self._jobs else None
            raise public_error(error, request_id, outcome="unknown") from None
        finally:
            self._flow = None

    def _extend(self) -> None:
        """Hand the ranks the next steps, where they are about to be through with those that they have."""
        self._extends_soon = False
        flow = self._flow
        if not self._waiting or flow is None or not flow.has_room:
            return
        jobs = self._more(self._jobs)
        if jobs:
            command = self._commands.number + len(self._jobs) + 1
            self._begin(jobs)
            try:
                flow.send(_formed(jobs), command=command)
            except Exception:
                # They run again when the others are over, and fail then, if it is theirs.
                self._flow = None

    def _took(self, results: Sequence[StepResult]) -> None:
        """The next steps were applied: record and answer them."""
        jobs = [self._jobs.popleft() for _ in results]
        self._ranks.caught_up()
        told = [
            with_times(result, job.call, job.waited.queue, job.waited.recovery)
            for job, result in zip(jobs, results, strict=True)
        ]
        before = self._description.step
        self._description.applied(results[-1])
        settled = self._commands.record_steps(jobs, told)
        # None of them outlives what it should later than the last.
        self._description.settles(settled[-1], before)
        for job, result, its in zip(jobs, told, settled, strict=True):
            job.take(result if its is None else Unsettled(result, its))
        self._commands.recorded()
        self._extend()

    async def _fail(self, error: Exception) -> None:
        """The next step ends with this error; those behind it were not begun."""
        if not self._jobs:
            return
        job = self._jobs.popleft()
        job.chain.refused(job.place)
        refusal = public_error(error, job.call.request_id, outcome="unknown")
        if refusal.outcome != "applied":
            job.fail(refusal)
            return
        try:
            job.take(await self._commands.end_with(refusal, job.call, job, (), self._description.step))
        except GradwireError as told:
            job.fail(told)


def _formed(jobs: Sequence[StepJob]) -> list[FormedStep]:
    return [job.formed for job in jobs if job.formed is not None]
