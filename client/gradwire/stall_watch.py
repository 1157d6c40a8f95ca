"""A stream may take as long as it likes, as long as it moves: cancels one that stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StallWatch:
    """Calls `cancel` when no item passed `over()` for `patience` seconds. `stalled` says that it did."""

    def __init__(self, patience: float, cancel: Callable[[], object]) -> None:
        self.stalled = False
        self._patience = patience
        self._cancel = cancel
        self._passed = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gradwire-stall-watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, noticing each."""
        for item in items:
            self._passed += 1
            yield item
        self._passed += 1

    def _watch(self) -> None:
        seen = -1
        while seen != self._passed:
            seen = self._passed
            if self._ended.wait(self._patience):
                return
        self.stalled = True
        self._cancel()
