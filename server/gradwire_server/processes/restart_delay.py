"""How long to wait before a dead process is started again."""

from __future__ import annotations

import time
from collections.abc import Callable


class RestartDelay:
    """Pauses that double with every death in a row, up to a bound; a long life starts over."""

    def __init__(
        self,
        *,
        shortest: float = 0.1,
        longest: float = 3.0,
        long_life: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shortest = shortest
        self._longest = longest
        self._long_life = long_life
        self._clock = clock
        self._pause = shortest
        self._born = clock()

    def after_death(self) -> float:
        """Seconds to wait now, before the next start."""
        if self._clock() - self._born >= self._long_life:
            self._pause = self._shortest
        pause = self._pause
        self._pause = min(2 * pause, self._longest)
        self._born = self._clock() + pause
        return pause
