"""Calls that return at once: a Future that threads and coroutines wait for, and the queue that keeps calls in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

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


class Steps(Protocol):
    """What sends training steps without waiting for those before: see StepFutures."""

    def __len__(self) -> int: ...

    @property
    def has_room(self) -> bool: ...

    def add(self, future: Future[Any], step: Any) -> None: ...

    def advance(self) -> None: ...

    def drain(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class CallQueue:
    """Runs the calls of one model one after another, in the order in which they were made; training steps through
    `steps`, without waiting for those before them.

    In a forked child, which has none of the threads, it takes no calls: `submit` and `wait` raise FailedPrecondition
    (CLIENT_FORKED).
    """

    def __init__(self, name: str, steps: Steps) -> None:
        self._name = name
        self._steps = steps
        self._process = os.getpid()
        self._waiting: deque[tuple[Future, Any, bool]] = deque()
        """Futures, with their calls or steps, and whether they are steps."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last: Future | None = None
        self._streams: list[tuple[int, Callable[[], None]]] = []
        """Threads whose calls come behind steps of a stream, and what waits for those."""

    @contextmanager
    def behind(self, settle: Callable[[], None]) -> Iterator[None]:
        """Inside, this thread's calls begin after `settle` has returned, which they call."""
        stream = (threading.get_ident(), settle)
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.remove(stream)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` after every call that was submitted before."""
        return self._submit(call, is_step=False)

    def submit_step(self, step: Any) -> Future[Any]:
        """Send a training step after every call that was submitted before, and behind every step."""
        return self._submit(step, is_step=True)

    def _submit(self, call: Any, *, is_step: bool) -> Future[Any]:
        self._check_process()
        self._settle_streams()
        future: Future[Any] = Future()
        with self._changed:
            self._waiting.append((future, call, is_step))
            self._last = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"gradwire-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify()
        self._steps.wake()
        return future

    def wait(self) -> None:
        """Return when every call that was submitted before has ended.

        At once in the done callback of one of the futures: what is submitted cannot end before the callback does.
        """
        self._check_process()
        if threading.current_thread() is self._thread:
            return
        self._settle_streams()
        last = self._last
        if last is not None and not last.done():
            concurrent.futures.wait((last,))

    def cancel(self) -> None:
        """Give up the calls that were not sent: their futures raise Cancelled."""
        if os.getpid() != self._process:  # They are the parent's to send.
            return
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for future, _, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(Cancelled("given up before the call was sent", reason="CLIENT_CLOSED"))

    def _settle_streams(self) -> None:
        for thread, settle in tuple(self._streams):
            if thread == threading.get_ident():
                settle()

    def _check_process(self) -> None:
        # Before any lock: a fork may have copied one that is held.
        if os.getpid() != self._process:
            message = f"this model belongs to process {self._process}; call gradwire.connect in each process"
            raise FailedPrecondition(message, reason="CLIENT_FORKED")

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not len(self._steps):
                    self._last = None
                    if not self._changed.wait_for(lambda: self._waiting, timeout=_LINGER):
                        self._steps.close()
                        self._thread = None
                        return
                next_one = self._waiting.popleft() if self._waiting and self._steps.has_room else None
            if next_one is None:
                self._steps.advance()
                continue
            future, call, is_step = next_one
            if future.set_running_or_notify_cancel():
                if is_step:
                    self._steps.add(future, call)
                else:
                    self._steps.drain()
                    _run_call(future, call)
            del future, call, next_one  # or this result would live until the next call has ended


def _run_call(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
