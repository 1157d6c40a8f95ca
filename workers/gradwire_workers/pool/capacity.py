"""How many ranks and GPUs models may hold, and what they hold now. Says no at once, with both numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted
from gradwire_proto.values import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one model takes. `device`: "cpu" or "cuda". owner: whose it is."""

    ranks: int
    device: str
    gpus_per_rank: float
    owner: str = ""

    @property
    def gpus(self) -> float:
        return self.ranks * self.gpus_per_rank


class Capacity:
    """The service's ranks and GPUs. `free_workers`, `free_gpus`: what no model holds.

    most_per_owner: ranks that models of one owner may hold together; None: all. on_freed: called when something was
    given back.
    """

    def __init__(self, *, workers: int, gpus: float, most_per_owner: int | None = None) -> None:
        self._most_per_owner = most_per_owner
        self._ranks_of: Counter[str] = Counter()
        self.workers = self.free_workers = workers
        self.gpus = self.free_gpus = gpus
        self.on_freed: Callable[[], None] = lambda: None

    def demand(self, spec: ModelSpec, owner: str = "") -> Demand:
        """What the model needs here. FailedPrecondition (NO_GPUS) where it needs GPUs and there are none."""
        wants_gpus = spec.device == "cuda" or (spec.device == "auto" and (self.gpus > 0 or spec.gpus_per_worker > 0))
        if wants_gpus and not self.gpus:
            field = "model.device" if spec.device == "cuda" else "model.gpus_per_worker"
            raise FailedPrecondition("the service has no GPUs", reason="NO_GPUS", field=field)
        return Demand(
            ranks=max(1, spec.workers),
            device="cuda" if wants_gpus else "cpu",
            gpus_per_rank=(spec.gpus_per_worker or 1.0) if wants_gpus else 0.0,
            owner=owner,
        )

    def claim(self, demand: Demand, ahead: Sequence[Demand] = ()) -> None:
        """Takes the demand out of what is free. ResourceExhausted (WORKERS_EXHAUSTED, GPUS_EXHAUSTED) if it is not, and
        OWNER_WORKERS_EXHAUSTED where the owner may not hold so many; retryable where it may be free some day.

        ahead: demands that wait, and come first.
        """
        refusals = [
            refusal
            for refusal in (
                self._too_few_workers(demand, ahead),
                self._too_few_gpus(demand, ahead),
                self._quota(demand),
            )
            if refusal is not None
        ]
        if refusals:
            # One that will never fit is told so, whatever else is taken now.
            raise min(refusals, key=lambda refusal: refusal.retryable)
        self._ranks_of[demand.owner] += demand.ranks
        self.free_workers -= demand.ranks
        self.free_gpus -= demand.gpus

    def is_within_quota(self, demand: Demand) -> bool:
        """Whether its owner may hold so many ranks more."""
        return self._quota(demand) is None

    def _too_few_workers(self, demand: Demand, ahead: Sequence[Demand]) -> ResourceExhausted | None:
        if demand.ranks <= self.free_workers - sum(each.ranks for each in ahead):
            return None
        return ResourceExhausted(
            f"asks for {demand.ranks} workers; {self.free_workers} of the service's {self.workers} are free"
            + (_ASKED_BEFORE if demand.ranks <= self.free_workers else ""),
            reason="WORKERS_EXHAUSTED",
            field="model.workers",
            retryable=demand.ranks <= self.workers,
        )

    def _too_few_gpus(self, demand: Demand, ahead: Sequence[Demand]) -> ResourceExhausted | None:
        if not demand.gpus or demand.gpus <= self.free_gpus - sum(each.gpus for each in ahead):
            return None
        return ResourceExhausted(
            f"asks for {demand.gpus:g} GPUs; {self.free_gpus:g} of the service's {self.gpus:g} are free"
            + (_ASKED_BEFORE if demand.gpus <= self.free_gpus else ""),
            reason="GPUS_EXHAUSTED",
            field="model.gpus_per_worker",
            retryable=demand.gpus <= self.gpus,
        )

    def _quota(self, demand: Demand) -> ResourceExhausted | None:
        most, held = self._most_per_owner, self._ranks_of[demand.owner]
        if most is None or held + demand.ranks <= most:
            return None
        return ResourceExhausted(
            f"asks for {demand.ranks} workers; your models hold {held} of the {most} that the server's setting"
            " owner_workers allows",
            reason="OWNER_WORKERS_EXHAUSTED",
            field="model.workers",
            retryable=demand.ranks <= most,
        )

    def free(self, demand: Demand) -> None:
        """Gives back what was claimed."""
        self._ranks_of[demand.owner] -= demand.ranks
        self.free_workers += demand.ranks
        self.free_gpus += demand.gpus
        self.on_freed()


_ASKED_BEFORE = ", and others have asked before"
