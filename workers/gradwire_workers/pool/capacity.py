"""How many ranks and GPUs models may hold, and what they hold now. Says no at once, with both numbers."""

from __future__ import annotations

from collections import Counter
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

    most_per_owner: ranks that models of one owner may hold together; None: all.
    """

    def __init__(self, *, workers: int, gpus: float, most_per_owner: int | None = None) -> None:
        self._most_per_owner = most_per_owner
        self._ranks_of: Counter[str] = Counter()
        self.workers = self.free_workers = workers
        self.gpus = self.free_gpus = gpus

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

    def claim(self, demand: Demand) -> None:
        """Takes the demand out of what is free. ResourceExhausted (WORKERS_EXHAUSTED, GPUS_EXHAUSTED) if it is not, and
        OWNER_WORKERS_EXHAUSTED where the owner may not hold so many.
        """
        if demand.ranks > self.free_workers:
            raise ResourceExhausted(
                f"asks for {demand.ranks} workers; {self.free_workers} of the service's {self.workers} are free",
                reason="WORKERS_EXHAUSTED",
                field="model.workers",
                retryable=demand.ranks <= self.workers,
            )
        if demand.gpus > self.free_gpus:
            raise ResourceExhausted(
                f"asks for {demand.gpus:g} GPUs; {self.free_gpus:g} of the service's {self.gpus:g} are free",
                reason="GPUS_EXHAUSTED",
                field="model.gpus_per_worker",
                retryable=demand.gpus <= self.gpus,
            )
        self._check_owner(demand)
        self._ranks_of[demand.owner] += demand.ranks
        self.free_workers -= demand.ranks
        self.free_gpus -= demand.gpus

    def _check_owner(self, demand: Demand) -> None:
        most, held = self._most_per_owner, self._ranks_of[demand.owner]
        if most is not None and held + demand.ranks > most:
            raise ResourceExhausted(
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
