"""How long things take: in turn with what they are compared with, round by round, because machines are shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """The seconds of each call, round by round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ms(self, name: str) -> str:
        """The median in words."""
        return f"{1e3 * self.median(name):.3f} ms"

    def quotients(self, name: str, other: str) -> list[float]:
        """Seconds of `name` over those of `other`, of each round."""
        return [mine / theirs for mine, theirs in zip(self.seconds[name], self.seconds[other], strict=True)]

    def over(self, name: str, other: str) -> float:
        """Their median."""
        return statistics.median(self.quotients(name, other))


def in_turn(rounds: int, calls: Mapping[str, Callable[[], float]], warm_up: int = 1) -> Taken:
    """Each call in every round, forwards and backwards by turns. A call returns its seconds; the first warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warm_up, rounds):
        for name in reversed(list(calls)) if number % 2 else calls:
            took = calls[name]()
            if number >= 0:
                seconds[name].append(took)
    return Taken(seconds)


def once(call: Callable[[], object]) -> float:
    """Seconds of one, what it returns being freed within them, as a loop that goes on frees it."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def mean(call: Callable[[], object], count: int) -> float:
    """Seconds of one, over a stretch of them."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def p50(call: Callable[[], object], count: int) -> float:
    """The median seconds of one."""
    return statistics.median(once(call) for _ in range(count))
