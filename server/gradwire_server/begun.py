"""Coroutines that begin at once: what they do before they first wait takes no turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def begin(coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """Run `coroutine` until it first waits for something; the rest in a task, which is returned, as asyncio runs any.

    Its beginning runs in the caller's task, or in none: it must not ask for the current one, as asyncio.timeout does.
    """
    loop = asyncio.get_running_loop()
    try:
        waits_for = coroutine.send(None)
    except BaseException as ending:
        ended: asyncio.Future[T] = loop.create_future()
        if isinstance(ending, StopIteration):
            ended.set_result(ending.value)
        elif isinstance(ending, Exception):
            ended.set_exception(ending)
        else:
            raise
        return ended
    return loop.create_task(_Begun(coroutine, waits_for))


class _Begun(Coroutine[Any, Any, T]):
    """A coroutine that waits for something, as one that has yet to say so."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def send(self, value: Any) -> Any:
        waits_for, self._waits_for = self._waits_for, None
        return self._coroutine.send(value) if waits_for is None else waits_for

    def throw(self, *error: Any) -> Any:
        self._waits_for = None
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("a task runs it")
