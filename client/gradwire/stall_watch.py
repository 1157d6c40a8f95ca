"""A stream may take as long as it likes, as long as it moves: cancels one that stands still."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StallWatch:
    """Calls `cancel` when nothing moved for `patience` seconds. `stalled` says that it did.

    Either way of a stream has its own: `over()` for what goes out, where whoever takes the items is watched, and
    `coming()` for what comes in, where whoever gives them is. since: from when on the first is waited for, in monotonic
    seconds; None: from when it is entered.
    """

    def __init__(self, patience: float, cancel: Callable[[], object], since: float | None = None) -> None:
        self.stalled = False
        self.patience = patience
        self._cancel = cancel
        self._since = since
        self._last_moved = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gradwire-stall-watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self._last_moved = time.monotonic() if self._since is None else self._since
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, noticing each: the time until the next is asked for counts."""
        for item in items:
            self._last_moved = time.monotonic()
            yield item
        self._last_moved = time.monotonic()

    def coming(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`: the time until the next is there counts, and none that passes before it is asked for."""
        for item in items:
            self._last_moved = math.inf
            yield item
            self._last_moved = time.monotonic()

    def _watch(self) -> None:
        while (rest := self._last_moved + self.patience - time.monotonic()) > 0:
            # It is looked at again in time, though what comes in may be waited for again from any moment on.
            if self._ended.wait(min(rest, self.patience)):
                return
        self.stalled = True
        self._cancel()
