"""The time that one call of the SDK may take, in however many requests."""

from __future__ import annotations

import time


class Deadline:
    """When a call must have ended: `seconds` after it began to ask the service.

    The clock runs in `with deadline.running()`, while the service is asked. Outside it stands: what the client does by
    itself, such as an export, and the wait behind calls that were made before, is not the service's. For one thread at
    a time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._left = seconds
        self._end: float | None = None

    @classmethod
    def begun(cls, seconds: float) -> Deadline:
        """One whose clock runs from now on."""
        deadline = cls(seconds)
        deadline._end = time.monotonic() + seconds
        return deadline

    @property
    def left(self) -> float:
        """Seconds until then; not above 0 where it has passed."""
        return self._left if self._end is None else self._end - time.monotonic()

    def running(self) -> _Running:
        """Let the clock run. Inside another such block this changes nothing."""
        return _Running(self)

    def _start(self) -> bool:
        """Whether it stood."""
        if self._end is not None:
            return False
        self._end = time.monotonic() + self._left
        return True

    def _stop(self) -> None:
        self._left, self._end = self.left, None

    def give_back(self, seconds: float) -> None:
        """Do not count `seconds` that have passed."""
        assert self._end is not None
        self._end += seconds

    def within(self, seconds: float) -> Deadline:
        """The end of a part of the call: `seconds` from when it begins, if this one comes no earlier."""
        return Deadline(min(seconds, self.left))


class _Running:
    """A block in which a deadline's clock runs. Not by contextlib, which takes several times as long."""

    __slots__ = ("_deadline", "_started")

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._started = False

    def __enter__(self) -> None:
        self._started = self._deadline._start()

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._deadline._stop()
