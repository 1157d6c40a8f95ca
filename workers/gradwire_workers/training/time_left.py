"""How long ranks may try a variant's batches: a client waits, and whole batches are right untried."""

from __future__ import annotations

from math import inf
from time import monotonic

import torch

from gradwire_workers.process_group import ProcessGroups


class OutOfTimeError(Exception):
    """What was to be tried takes longer than there is time for. Every rank of the model raises it at the same place."""


class TimeLeft:
    """`seconds` from now on, of wall time; groups: the ranks that try together, None for one alone."""

    def __init__(self, seconds: float = inf, groups: ProcessGroups | None = None) -> None:
        self._last = monotonic()
        self._ends = self._last + seconds
        self._longest = 0.0
        self._groups = groups

    def check(self) -> None:
        """Raise OutOfTimeError where on any rank the time is up, or would be if what comes next took as long as the
        longest between two checks so far. Every rank calls it."""
        now = monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        is_up = torch.tensor([now + self._longest > self._ends], dtype=torch.uint8)
        if self._groups is not None:
            self._groups.all_reduce(is_up, largest=True)
        if is_up.item():
            raise OutOfTimeError
