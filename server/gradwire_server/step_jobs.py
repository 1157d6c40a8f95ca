"""Training steps as they wait in a model's queue, each with its place among those of its stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from gradwire_proto.batch_form import FormedStep
from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_proto.values import Batch, StepResult
from gradwire_server.calls import Call
from gradwire_server.live_ranks import Wait
from gradwire_server.tensors.uploads import Claim
from gradwire_server.work_queue import Job, Unsettled


@dataclass(frozen=True, slots=True)
class LoneStep:
    """A step that goes to the ranks alone: some of its tensors travel apart, or there is much besides them."""

    batch: Batch
    lr: float | None


class Chain:
    """The steps of one stream, which have places in it: those behind one that was refused, or undone, are refused."""

    def __init__(self) -> None:
        self._refused: float = inf
        self._joined: list[tuple[int, Job[Any]]] = []

    def refuses(self, place: float) -> bool:
        """Whether a step before this place was refused."""
        return self._refused < place or any(before < place and job.has_failed for before, job in self._joined)

    def refused(self, place: int) -> None:
        """The step at this place was refused, or undone."""
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
    """

    def __init__(
        self,
        call: Call,
        claim: Claim[Any],
        work: Callable[[Any], Awaitable[StepResult | Unsettled[StepResult]]],
        failed: Callable[[GradwireError], None],
        *,
        wait: Wait,
        formed: FormedStep | None,
        chain: Chain,
        place: int,
    ) -> None:
        super().__init__(call, claim, work, failed)
        self.call = call
        self.formed = formed
        self.chain = chain
        self.place = place
        self.waited = wait

    def undo(self) -> None:
        super().undo()
        # Those behind it must not go on without it; it has not ended yet.
        self.chain.refused(self.place)
