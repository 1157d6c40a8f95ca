"""Calls of a library that may never return, each waited for only so long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_MOST_HUNG = 8
"""Calls that have not returned in time keep a thread each; with so many, no further one is begun."""


class BoundedCalls:
    """Calls from any thread. After `patience` seconds TimeoutError is raised, and the call is left to itself."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._hung: set[Future[Any]] = set()
        self._lock = threading.Lock()

    def __call__(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        with self._lock:
            self._hung = {each for each in self._hung if not each.done()}
            if len(self._hung) >= _MOST_HUNG:
                raise TimeoutError(f"{len(self._hung)} earlier calls have not returned")
        answer: Future[T] = Future()
        # Daemons: the process must not wait at its end for what never returns.
        threading.Thread(target=_run, args=(answer, function, arguments, options), daemon=True).start()
        try:
            return answer.result(self._patience)
        except TimeoutError:
            if answer.done():
                raise
            with self._lock:
                self._hung.add(answer)
            raise TimeoutError(f"no answer within {self._patience:g} seconds") from None


def _run(
    answer: Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    try:
        answer.set_result(function(*arguments, **options))
    except BaseException as error:
        answer.set_exception(error)
