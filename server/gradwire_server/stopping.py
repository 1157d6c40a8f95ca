"""How a service stops: not ready, drained, saved, and within its grace, whatever hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Protocol

logger = logging.getLogger(__name__)

_LONGEST_CLOSE = 5.0
"""Seconds of the grace that are kept for closing, at most; and no more than a quarter of it."""

_LEAST_CLOSE = 1.0
"""Seconds that closing has in any case."""


class Grace:
    """The seconds that the end of the service may take in all, counted from `begin`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def begin(self) -> None:
        """The service is to stop."""
        self._end = time.monotonic() + self._seconds

    @property
    def before_closing(self) -> float:
        """Seconds left for what is to be done before the service is closed."""
        return max(0.0, self._left - min(_LONGEST_CLOSE, self._seconds / 4))

    def closing(self, most: float) -> float:
        """Seconds that one part of closing may take: `most`, and no more than are left."""
        return most if self._end is None else min(most, max(_LEAST_CLOSE, self._left))

    @property
    def _left(self) -> float:
        return self._seconds if self._end is None else self._end - time.monotonic()


class Stoppable(Protocol):
    """What is asked of the service."""

    async def drain(self) -> None: ...

    async def save_changed(self) -> None: ...


async def stop_in_order(
    service: Stoppable, grace: Grace, hurry: Awaitable[object], *, drain_seconds: float, saves: bool
) -> None:
    """Let requests end, for `drain_seconds` at most, and save what has changed; cut short by `hurry`. Never raises.

    saves: whether anything is to be saved.
    """
    grace.begin()
    stopping = asyncio.ensure_future(_drain_and_save(service, grace, drain_seconds, saves))
    hurried = asyncio.ensure_future(hurry)
    await asyncio.wait([stopping, hurried], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        logger.warning("a second signal came: what still runs is cut")
    for task in (stopping, hurried):
        task.cancel()
    await asyncio.gather(stopping, hurried, return_exceptions=True)


async def _drain_and_save(service: Stoppable, grace: Grace, drain_seconds: float, saves: bool) -> None:
    try:
        async with asyncio.timeout(min(drain_seconds, grace.before_closing)):
            await service.drain()
    except TimeoutError:
        logger.warning("requests were still running after draining; they are cut")
    except Exception:
        logger.exception("draining failed")
    if not saves:
        return
    try:
        async with asyncio.timeout(grace.before_closing):
            await service.save_changed()
    except TimeoutError:
        logger.warning("the grace was too short for a last checkpoint of every model; the journals have the rest")
    except Exception:
        logger.exception("the last checkpoints failed")
