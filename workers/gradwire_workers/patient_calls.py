"""Blocking calls that may never return, made in threads that nothing waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, function: Callable[[], T]) -> T:
    """What `function` returns. Raises TimeoutError after so many seconds; it is left to itself then, and so it is where
    the caller is cancelled. The process may end all the same.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    # A daemon, and no executor's: these are waited for at the end of the process.
    threading.Thread(target=run, name="gradwire-patient", daemon=True).start()
    # Shielded: to cancel a future that has a thread's answer yet to come would make that thread fail.
    return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(answer)), seconds)
