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


async def in_thread(function: Callable[..., T], *arguments: Any, threads: Executor | None = None) -> T:
    """Call `function` in a thread. Who is cancelled meanwhile hears of it when the call has ended.

    threads: of those; None: of the ones that everything in the process shares.
    """
    job = asyncio.get_running_loop().run_in_executor(threads, partial(function, *arguments))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        # A thread cannot be stopped, and its file must not be closed while it writes.
        await asyncio.wait([job])
        raise
