"""One level of a sweep: warmed up, measured until three windows agree, and what that gave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gradwire.load_test.arrivals import due_times
from gradwire.load_test.connections import Connections
from gradwire.load_test.generators import Sender, closed_loop, open_loop
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.requests import Prepared, timing_reader
from gradwire.load_test.windows import ALIKE, PARTS, Recorder, Window, is_stable

PERCENTILES = (50.0, 90.0, 95.0, 99.0)

_LATE_US, _LATE_PART = 1000, 0.1
"""The tester is late where the 99th percentile of its lag is above both: microseconds, and a part of the latency's."""

_BUSY = 0.9
"""The tester may be what is measured where it computes more than this part of the time: it has one core."""

_TOO_FEW = 0.95
"""The service does not keep up with a rate where it answers less than this part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What a load gave. measured: the last three windows as one; windows: all, in order. floor: the bare echo's.

    `measured` has also the latencies and errors of requests that were still waiting when the last window closed: those
    that wait longest are not to be missed. Its seconds and the rate do without them.
    """

    load: Load
    measured: Window
    windows: tuple[Window, ...]
    rate: float
    stable: bool
    floor: Level | None = None

    @property
    def ratio(self) -> float | None:
        """Answers each second over the floor's."""
        return self.rate / self.floor.rate if self.floor is not None and self.floor.rate else None

    @property
    def latencies_ms(self) -> dict[str, float | None]:
        """Mean, percentiles and maximum."""
        latencies = self.measured.latencies
        figures: dict[str, float | None] = {"mean": latencies.mean}
        figures |= {f"p{percent:g}": latencies.percentile(percent) for percent in PERCENTILES}
        figures["max"] = latencies.highest if latencies.count else None
        return {name: None if value is None else value / 1000 for name, value in figures.items()}

    @property
    def split_ms(self) -> dict[str, float]:
        """Where the mean answer's time went. "other": the rest of the frontend's; "outside": network, gRPC, tester.

        Together the mean, or a little more: the rank that is slowest in one part need not be in another. Requests that
        were never sent have no part in it.
        """
        measured = self.measured
        if not measured.answered:
            return {}
        parts = {part: 1000 * total / measured.answered for part, total in zip(PARTS, measured.parts, strict=True)}
        total, mean = parts.pop("total"), measured.answered_us / measured.answered
        return {**parts, "other": max(0.0, total - sum(parts.values())), "outside": max(0.0, mean / 1000 - total)}

    @property
    def errors(self) -> int:
        return self.measured.errors.total()

    @property
    def tester_cpu(self) -> float:
        """How much of a core the tester took."""
        return self.measured.cpu / self.measured.seconds

    @property
    def notes(self) -> tuple[str, ...]:
        """What keeps the figures from being believed as they stand."""
        lag, latency = self.measured.lags.percentile(99), self.measured.latencies.percentile(99)
        is_late = lag is not None and latency is not None and lag > max(_LATE_US, _LATE_PART * latency)
        found = {
            "unstable": not self.stable,
            "tester late": is_late,
            "tester busy": self.tester_cpu > _BUSY,
            "not sent": self.measured.unsent > 0,
            "below the rate": self.load.is_rate and self.rate < _TOO_FEW * self.load.value,
        }
        return tuple(note for note, holds in found.items() if holds)


async def measure(
    load: Load,
    connections: Connections,
    requests: Sequence[Prepared],
    options: Options,
    progress: Callable[[str], None],
) -> Level:
    """Put the load on, until windows agree or there were as many as the options allow."""
    recorder, over = Recorder(timing_reader(requests[0].method)), asyncio.Event()
    sender = Sender(connections, requests, recorder, options.timeout)
    if load.is_rate:
        times = due_times(load.value, options.arrivals, options.seed)
        generator = open_loop(sender.send, times, over, lambda waited: recorder.unsent(waited, load.value))
    else:
        generator = closed_loop(sender.send, int(load.value), over)
    task = asyncio.create_task(generator)
    try:
        progress(f"{load}: warming up")
        await _wait(task, options.warm_up)
        recorder.turn()
        windows: list[Window] = []
        while len(windows) < options.max_windows and not _is_over(windows, options):
            await _wait(task, options.window)
            windows.append(recorder.turn())
            progress(
                f"{load}: window {len(windows)} of at most {options.max_windows}, {windows[-1].rate:.1f} requests/s"
            )
        over.set()
        progress(f"{load}: waiting for the last answers")
        await task
    finally:
        task.cancel()
    return _level(load, windows, recorder.turn(), options)


def _is_over(windows: Sequence[Window], options: Options) -> bool:
    # What fails altogether does not get stable.
    is_failing = bool(windows) and not windows[-1].latencies.count and bool(windows[-1].errors)
    return is_failing or is_stable(windows, options.stable, options.percentile)


async def _wait(task: asyncio.Task[None], seconds: float) -> None:
    """Sleep, or raise what ended the task."""
    await asyncio.wait({task}, timeout=seconds)
    if task.done():
        task.result()


def _level(load: Load, windows: Sequence[Window], rest: Window, options: Options) -> Level:
    """rest: what ended after the last window, while nothing was sent any more."""
    measured = Window.merged(windows[-ALIKE:])
    return Level(
        load=load,
        measured=replace(Window.merged([measured, rest]), seconds=measured.seconds, cpu=measured.cpu),
        windows=tuple(windows),
        rate=measured.rate,
        stable=is_stable(windows, options.stable, options.percentile),
    )
