"""What faults cost: stalls by kind, and the share of time lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import islice

from chaos.faults import Fault
from chaos.training import Made


def stalls(faults: Sequence[Fault], trainings: Sequence[Sequence[Made]]) -> dict[str, list[float]]:
    """For each kind, for each fault: seconds that the step it hit took beyond the usual, of the model it hit worst."""
    found: dict[str, list[float]] = {}
    for fault in faults:
        found.setdefault(fault.kind, []).append(max(stall(fault, made) for made in trainings))
    return found


def stall(fault: Fault, made: Sequence[Made]) -> float:
    """Seconds beyond the usual that the step took which the fault hit: the one under way, or one of the next two.

    What is killed may have ended its part of a step that is under way.
    """
    return max((0.0, *(each.end - max(each.begin, fault.at) - usual(made) for each in hit_by(fault, made))))


def hit_by(fault: Fault, made: Sequence[Made]) -> list[Made]:
    """The step that was under way, or came next, when the fault struck, and the two after it."""
    return list(islice((each for each in made if each.end > fault.at), 3))


def usual(made: Sequence[Made]) -> float:
    """The median step, in seconds."""
    return statistics.median(each.end - each.begin for each in made)


def lost_share(made: Sequence[Made]) -> float:
    """The share of a training's time that its steps took beyond the usual; of steps twice as long or more."""
    normal = usual(made)
    took = [each.end - each.begin for each in made]
    return sum(each - normal for each in took if each > 2 * normal) / (made[-1].end - made[0].begin)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
