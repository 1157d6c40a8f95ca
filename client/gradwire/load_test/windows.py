"""What is counted while requests are answered, window by window, and when windows are alike enough to be believed."""

from __future__ import annotations

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


@dataclass(slots=True, kw_only=True)
class Window:
    """What ended between two points in time. Latencies and lags are in microseconds; `parts` are sums of seconds.

    latencies: of requests that succeeded. lags: by how much later than due the tester sent them. errors: by reason.
    cpu: seconds that the tester computed. unsent: requests that were due, and have waited for too many others to be
    answered: they are among the latencies and lags, with the time that they had waited.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    latencies: Histogram = field(default_factory=Histogram)
    lags: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)
    unsent: int = 0
    parts: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))

    @property
    def rate(self) -> float:
        """Answers each second, errors not among them."""
        return self.latencies.count / self.seconds if self.seconds else 0.0

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

    def unsent(self, waited_ns: int) -> None:
        """Note a request that was due so long ago and will not be sent: its latency would be longer."""
        self.window.latencies.record(waited_ns // 1000)
        self.window.lags.record(waited_ns // 1000)
        self.window.unsent += 1

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
