"""Calls that return at once: a Future that threads and coroutines wait for, and the queue that keeps calls in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from gradwire_proto.errors import Cancelled, FailedPrecondition

T = TypeVar("T")

_LINGER = 1.0
"""Seconds that an idle queue keeps its thread: starting one costs as much as a small call."""


class Future(concurrent.futures.Future, Generic[T]):
    """The result of a call that was made and has not ended yet.

    `result(timeout)` waits (TimeoutError when `timeout` seconds pass; the call goes on), `await future` does so in any
    running event loop. `cancel()` gives up a call that was not sent yet, and returns whether it could; a call that was
    sent runs to its end. Cancelling a coroutine that awaits the future cancels the future in the same way. `done()`,
    `exception()` and `add_done_callback()` are those of concurrent.futures.Future, whose `wait` and `as_completed` take
    this one.
    """

    def result(self, timeout: float | None = None) -> T:
        """The call's result. Raises what the call raised."""
        return super().result(timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()


class CallQueue:
    """Runs the calls of one model one after another, in the order in which they were made.

    In a forked child, which has none of the threads, it takes no calls: `submit` and `wait` raise FailedPrecondition
    (CLIENT_FORKED).
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._process = os.getpid()
        self._waiting: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last: Future | None = None

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` after every call that was submitted before."""
        self._check_process()
        future: Future[T] = Future()
        with self._changed:
            self._waiting.append((future, call))
            self._last = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"gradwire-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def wait(self) -> None:
        """Return when every call that was submitted before has ended.

        At once in the done callback of one of the futures: what is submitted cannot end before the callback does.
        """
        self._check_process()
        if threading.current_thread() is self._thread:
            return
        last = self._last
        if last is not None and not last.done():
            concurrent.futures.wait((last,))

    def cancel(self) -> None:
        """Give up the calls that were not sent: their futures raise Cancelled."""
        if os.getpid() != self._process:  # They are the parent's to send.
            return
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(Cancelled("given up before the call was sent", reason="CLIENT_CLOSED"))

    def _check_process(self) -> None:
        # Before any lock: a fork may have copied one that is held.
        if os.getpid() != self._process:
            message = f"this model belongs to process {self._process}; call gradwire.connect in each process"
            raise FailedPrecondition(message, reason="CLIENT_FORKED")

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._changed.wait_for(lambda: self._waiting, timeout=_LINGER):
                    self._thread = None
                    return
                future, call = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            result = None
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            with self._changed:
                if self._last is future:
                    self._last = None
            del future, call, result  # or this result would live until the next call has ended
