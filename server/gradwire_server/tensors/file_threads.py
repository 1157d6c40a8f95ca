"""File reads and writes that leave the event loop to other requests meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
"""Bytes of one message of a stream: the fastest size that was measured."""

THREAD_BYTES = 256 << 10
"""Below this, handing the work to a thread costs more than the work."""


async def move_bytes(nbytes: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function`, which moves `nbytes`; in a thread where that takes long. A call that began always ends."""
    if nbytes < THREAD_BYTES:
        return function(*arguments)
    return await in_thread(function, *arguments)


async def in_thread(
    function: Callable[..., T],
    *arguments: Any,
    threads: Executor | None = None,
    unwanted: Callable[[T], object] | None = None,
) -> T:
    """Call `function` in a thread. Who is cancelled meanwhile hears of it when the call has ended.

    threads: of those; None: of the ones that everything in the process shares. unwanted: called there with a result
    that nobody gets, because its caller was cancelled.
    """
    loop = asyncio.get_running_loop()
    job = loop.run_in_executor(threads, partial(function, *arguments))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        if unwanted is not None:
            job.add_done_callback(partial(_hand_back, loop, threads, unwanted))
        # A thread cannot be stopped, and its file must not be closed while it writes.
        await asyncio.wait([job])
        raise


def _hand_back(
    loop: asyncio.AbstractEventLoop,
    threads: Executor | None,
    unwanted: Callable[[T], object],
    job: asyncio.Future[T],
) -> None:
    if not job.cancelled() and job.exception() is None:
        loop.run_in_executor(threads, unwanted, job.result())
