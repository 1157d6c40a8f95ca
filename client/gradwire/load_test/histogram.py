"""Latencies as an HDR histogram keeps them: three significant digits, however long they are, in little memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

_BITS = 11
"""A value is kept to its first eleven bits, an error below 0.1 %. Below 2,048 µs all values are exact."""


class Histogram:
    """How often each latency came, in whole microseconds. `total`, `lowest` and `highest` are exact."""

    __slots__ = ("_counts", "count", "highest", "lowest", "total")

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total = 0
        self.lowest: int | None = None
        self.highest = 0
        for value in values:
            self.record(value)

    def record(self, value: int, times: int = 1) -> None:
        """Add one latency, in microseconds, 0 or more, or several that are alike."""
        # Powers of two in 2,048 equal parts: keys rise with values.
        shift = value.bit_length() - _BITS
        key = (shift << _BITS) | (value >> shift) if shift > 0 else value
        counts = self._counts
        counts[key] = counts.get(key, 0) + times
        self.count += times
        self.total += times * value
        if value > self.highest:
            self.highest = value
        if self.lowest is None or value < self.lowest:
            self.lowest = value

    @staticmethod
    def merged(parts: Iterable[Histogram]) -> Histogram:
        """All that was recorded in any of the parts."""
        whole, counts = Histogram(), Counter[int]()
        for part in parts:
            counts.update(part._counts)
            whole.count += part.count
            whole.total += part.total
            whole.highest = max(whole.highest, part.highest)
            lows = [low for low in (whole.lowest, part.lowest) if low is not None]
            whole.lowest = min(lows, default=None)
        whole._counts = dict(counts)
        return whole

    def percentile(self, percent: float) -> int | None:
        """The latency that `percent` of all do not exceed, to three digits; None where there are none."""
        if not self.count:
            return None
        # Rounded: 99.9% of 1,000 is 999, though floats have a little more.
        rank, seen = max(1, math.ceil(round(percent / 100 * self.count, 6))), 0
        for value, count in self:
            seen += count
            if seen >= rank:
                return value
        return self.highest

    @property
    def mean(self) -> float | None:
        """In microseconds; None where there are none."""
        return self.total / self.count if self.count else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(latency, how often), rising. Each latency is the highest that is counted with it."""
        for key in sorted(self._counts):
            shift = key >> _BITS
            highest = (((key & ((1 << _BITS) - 1)) + 1) << shift) - 1
            yield min(highest, self.highest), self._counts[key]
