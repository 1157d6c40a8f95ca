"""What is counted while requests are answered, window by window, and when windows are alike enough to be believed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwire.load_test.histogram import Histogram

ALIKE = 3
"""How many windows, the last ones, have to agree: a level's figures are those of these windows."""

PARTS = ("queue", "transfer", "compute", "all_reduce", "optimizer", "recovery", "total")
"""What a reply's `timing` tells, in seconds."""

_GROUPS = 10_000
"""Requests that were not sent are counted in so many groups at most, those of each with one latency."""


@dataclass(slots=True, kw_only=True)
class Window:
    """What ended between two points in time. Latencies and lags are in microseconds; `parts` are sums of seconds.

    latencies: of requests that succeeded. lags: by how much later than due the tester sent them. errors: by reason.
    cpu: seconds that the tester computed. unsent: requests that were due, and have waited for too many others to be
    answered: they are among the latencies and lags, with the time that they had waited, `unsent_us` together.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    latencies: Histogram = field(default_factory=Histogram)
    lags: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)
    unsent: int = 0
    unsent_us: int = 0
    parts: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))

    @property
    def answered(self) -> int:
        """Requests that succeeded."""
        return self.latencies.count - self.unsent

    @property
    def answered_us(self) -> int:
        """How long these took together."""
        return self.latencies.total - self.unsent_us

    @property
    def rate(self) -> float:
        """Answers each second, errors not among them."""
        return self.answered / self.seconds if self.seconds else 0.0

    def latency(self, percentile: float | None) -> float | None:
        """A percentile of the latencies, or their mean, in microseconds; None where nothing succeeded."""
        return self.latencies.mean if percentile is None else self.latencies.percentile(percentile)

    @staticmethod
    def merged(windows: Sequence[Window]) -> Window:
        """One that is as long as all together."""
        errors: Counter[str] = Counter()
        for window in windows:
            errors.update(window.errors)
        return Window(
            seconds=sum(window.seconds for window in windows),
            cpu=sum(window.cpu for window in windows),
            latencies=Histogram.merged(window.latencies for window in windows),
            lags=Histogram.merged(window.lags for window in windows),
            errors=errors,
            unsent=sum(window.unsent for window in windows),
            unsent_us=sum(window.unsent_us for window in windows),
            parts=[sum(part) for part in zip(*(window.parts for window in windows), strict=True)],
        )


class Recorder:
    """Takes down each request as it ends, into the window that is open. timing: what a reply, in bytes, tells."""

    def __init__(self, timing: Callable[[bytes], Any]) -> None:
        self._timing = timing
        self.window = Window()
        self._opened = (time.monotonic(), time.process_time())

    def succeeded(self, latency_ns: int, lag_ns: int, reply: bytes) -> None:
        """Note an answer: nanoseconds from when it was due until it was there, and until it was sent."""
        window = self.window
        window.latencies.record(latency_ns // 1000)
        window.lags.record(lag_ns // 1000)
        timing, parts = self._timing(reply), window.parts
        for index, part in enumerate(PARTS):
            parts[index] += getattr(timing, part)

    def failed(self, reason: str) -> None:
        self.window.errors[reason] += 1

    def unsent(self, waited_ns: int, rate: float) -> None:
        """Note the requests that will not be sent, of which the first was due so long ago: they would take longer.

        rate: how many came due each second since, evenly, however long these are together.
        """
        count = math.floor(waited_ns / 1e9 * rate) + 1
        groups = min(count, _GROUPS)
        for group in range(groups):
            first, end = count * group // groups, count * (group + 1) // groups
            # That of its middle; none is due later than now.
            waited_us = max(0, round((waited_ns / 1e9 - (first + end - 1) / 2 / rate) * 1e6))
            self.window.latencies.record(waited_us, end - first)
            self.window.lags.record(waited_us, end - first)
            self.window.unsent_us += waited_us * (end - first)
        self.window.unsent += count

    def turn(self) -> Window:
        """Close the open window and open the next. Returns the closed one."""
        now = (time.monotonic(), time.process_time())
        closed, self.window = self.window, Window()
        closed.seconds, closed.cpu = now[0] - self._opened[0], now[1] - self._opened[1]
        self._opened = now
        return closed


def is_stable(windows: Sequence[Window], tolerance: float, percentile: float | None) -> bool:
    """Whether the last three windows are within `tolerance` of their mean, in throughput and in latency."""
    last = windows[-ALIKE:]
    latencies = [window.latency(percentile) for window in last]
    if len(last) < ALIKE or any(latency is None for latency in latencies):
        return False
    figures = ([window.rate for window in last], [latency for latency in latencies if latency is not None])
    return all(_is_close(figure, tolerance) for figure in figures)


def _is_close(values: Sequence[float], tolerance: float) -> bool:
    mean = sum(values) / len(values)
    return all(abs(value - mean) <= tolerance * mean for value in values)
