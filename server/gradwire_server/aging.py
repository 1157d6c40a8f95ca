"""What is kept for a while and then forgotten, oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Generic, TypeVar

REMEMBER_SECONDS = 600.0
"""How long, at least, it is known what became of a request: far longer than anybody sends it again."""

V = TypeVar("V")


class Aging(Generic[V]):
    """Values by name, each with a time in seconds since 1970, which `clock` tells.

    What is older than REMEMBER_SECONDS goes with the next that comes; beyond `most` the oldest go even when they are
    younger.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._values: OrderedDict[str, tuple[V, float]] = OrderedDict()

    def add(self, name: str, value: V, since: float) -> None:
        """Keep a value, in place of one of the same name."""
        self._values.pop(name, None)
        self._values[name] = (value, since)
        too_old = self._clock() - REMEMBER_SECONDS
        while self._values:
            oldest, (_, its_time) = next(iter(self._values.items()))
            if its_time > too_old and len(self._values) <= self._most:
                break
            del self._values[oldest]

    @property
    def is_full(self) -> bool:
        """Whether the next one takes the place of one that should be kept longer."""
        if len(self._values) < self._most:
            return False
        _, since = next(iter(self._values.values()))
        return since > self._clock() - REMEMBER_SECONDS

    def get(self, name: str) -> V | None:
        """The value of that name, if it is still known."""
        found = self._values.get(name)
        return None if found is None else found[0]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def pop(self, name: str) -> V | None:
        """Forget it; what it was."""
        found = self._values.pop(name, None)
        return None if found is None else found[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def values(self) -> Iterator[V]:
        """All that is known, oldest first, as the names are."""
        return map(itemgetter(0), self._values.values())
