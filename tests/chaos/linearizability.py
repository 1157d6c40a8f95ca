"""Is there an order in which a history of concurrent calls could have happened one after another?

The search of Wing and Gong (1993) with Lowe's cache of what was tried: of the calls that nobody had to wait for, one is
taken as the first; where its answer fits the state, the rest is tried from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A call and its answer. begin, end: when it was made and when it was answered, on one clock.

    end infinite, answer None: nobody knows what became of it. It may have happened at any time after its begin, or not.
    """

    kind: str
    argument: Any
    answer: Any
    begin: float
    end: float = math.inf

    @property
    def is_open(self) -> bool:
        return math.isinf(self.end)


Apply = Callable[[Hashable, Operation], tuple[Hashable, Any]]
"""(state after the operation, its answer)."""


def is_linearizable(history: Sequence[Operation], start: Hashable, apply: Apply) -> bool:
    """Whether some order that keeps to the clock explains every answer."""
    operations = sorted(history, key=lambda each: each.begin)
    answered = frozenset(index for index, each in enumerate(operations) if not each.is_open)
    seen: set[tuple[frozenset[int], Hashable]] = set()
    waiting: list[tuple[frozenset[int], Hashable]] = [(frozenset(), start)]
    while waiting:
        done, state = waiting.pop()
        if answered <= done:
            return True
        if (done, state) in seen:
            continue
        seen.add((done, state))
        left = [index for index in range(len(operations)) if index not in done]
        first_end = min(operations[index].end for index in left)
        for index in reversed(left):
            each = operations[index]
            # One that began after another had ended cannot come before it.
            if each.begin > first_end:
                continue
            after, answer = apply(state, each)
            if each.is_open or answer == each.answer:
                waiting.append((done | {index}, after))
    return False
