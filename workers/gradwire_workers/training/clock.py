"""Where the time of a command went on one rank."""

from __future__ import annotations

from time import perf_counter

from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.training.reports import Seconds


class Clock:
    """Runs from when it is made: `computed` ends the passes, `updated` the update."""

    def __init__(self, groups: ProcessGroups | None) -> None:
        self._groups = groups
        self._waited_before = 0.0 if groups is None else groups.seconds
        self._compute = self._all_reduce = 0.0
        self._began = perf_counter()

    def computed(self, *, waited: float = 0.0) -> Seconds:
        """The time since the start, split. `waited`: in collectives that ran beside the backward pass."""
        if self._groups is not None:
            waited += self._groups.seconds - self._waited_before
        passed = perf_counter() - self._began
        self._began += passed
        self._compute, self._all_reduce = max(passed - waited, 0.0), min(waited, passed)
        return Seconds(self._compute, self._all_reduce)

    def updated(self) -> Seconds:
        """The same, with the time since `computed` as the optimizer's."""
        return Seconds(self._compute, self._all_reduce, perf_counter() - self._began)
