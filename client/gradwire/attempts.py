"""When a call that failed is sent again: after growing waits with full jitter, and never past its time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from gradwire.deadline import Deadline
from gradwire.errors import GradwireError, Unavailable

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0
"""Seconds that the first wait takes at most, and any. Each may take twice as long as the one before."""

_TOO_LATE = 0.03
"""Seconds in which no call can be expected to end."""

# Not the generator that users seed.
_RANDOM = random.SystemRandom()


class Lost(Exception):
    """The answer was lost: `error` is what grpc makes of it; the service said nothing."""

    def __init__(self, error: GradwireError) -> None:
        super().__init__(error)
        self.error = error


class Attempts:
    """The attempts of one call, which end `kept` seconds before its deadline, or when `closed` is set."""

    def __init__(self, deadline: Deadline, closed: threading.Event, kept: float = 0.0) -> None:
        self.kept = kept
        self._deadline = deadline
        self._closed = closed
        self._longest = _FIRST_WAIT

    @property
    def seconds_left(self) -> float:
        """Until they end; not above 0 where they have."""
        return self._deadline.left - self.kept

    def wait(self, error: GradwireError, until_connected: Callable[[float], None]) -> bool:
        """Wait before another attempt, as `error` asks for. False where there is no time for one.

        until_connected: waits for a connection, so many seconds at most; called where there was none.
        """
        left = self.seconds_left
        if left < _TOO_LATE:
            return False
        # Full jitter: clients that lost the same service do not come back all at once.
        wait = _RANDOM.uniform(0, self._longest) + (error.retry_after or 0.0)
        self._longest = min(_LONGEST_WAIT, 2 * self._longest)
        # Half of what is left at most: the last attempt has time to succeed.
        wait = min(wait, left / 2)
        if error.reason == "NOT_CONNECTED":
            until_connected(wait)
            return not self._closed.is_set()
        return not self._closed.wait(wait)


def is_passing(error: GradwireError) -> bool:
    """Whether the same call may well succeed in a while: the service is away, starts, recovers, or says when to ask."""
    may_pass = error.retryable and error.outcome != "applied"
    return may_pass and (isinstance(error, Unavailable) or error.retry_after is not None)
