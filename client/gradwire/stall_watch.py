"""A stream may take as long as it likes, as long as it moves: cancels one that stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StallWatch:
    """Calls `cancel` when no item passed `over()` for `patience` seconds. `stalled` says that it did.

    since: from when on the first is waited for, in monotonic seconds; None: from when it is entered.
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
        """Yield `items`, noticing each."""
        for item in items:
            self._last_moved = time.monotonic()
            yield item
        self._last_moved = time.monotonic()

    def _watch(self) -> None:
        while (rest := self._last_moved + self.patience - time.monotonic()) > 0:
            if self._ended.wait(rest):
                return
        self.stalled = True
        self._cancel()
