"""When requests are due that come at a rate, whether or not the ones before were answered."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

KINDS = ("constant", "poisson")


def due_times(rate: float, kind: str, seed: int) -> Iterator[float]:
    """Seconds from the start at which each request is due, without end.

    "constant": 1 / rate apart. "poisson": independent of each other, as from many clients, `rate` a second in the mean;
    the same seed gives the same times.
    """
    if kind == "constant":
        # By multiplication: a sum would drift.
        for number in count():
            yield number / rate
    gaps, now = random.Random(seed), 0.0
    while True:
        now += gaps.expovariate(rate)
        yield now
