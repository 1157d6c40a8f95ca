"""Windows and levels with known numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gradwire.load_test.histogram import Histogram
from gradwire.load_test.levels import Level
from gradwire.load_test.loads import Load
from gradwire.load_test.windows import Window


def window(
    milliseconds: Sequence[float], *, seconds: float = 1.0, lag: float = 0.0, cpu: float = 0.1, **errors: int
) -> Window:
    """One in which requests took so long; each spent 1 ms in the queue, 2 in compute, and 4 in all on the service."""
    count = len(milliseconds)
    return Window(
        seconds=seconds,
        cpu=cpu,
        latencies=Histogram(round(1000 * each) for each in milliseconds),
        lags=Histogram([round(1000 * lag)] * count),
        errors=Counter(errors),
        parts=[0.001 * count, 0.0, 0.002 * count, 0.0, 0.0, 0.0, 0.004 * count],
    )


def level(load: Load, windows: Sequence[Window], *, stable: bool = True, floor: Level | None = None) -> Level:
    merged = Window.merged(windows)
    return Level(load=load, measured=merged, windows=tuple(windows), rate=merged.rate, stable=stable, floor=floor)
