"""Processes that wait, with torch imported, for a model.

Starting a rank costs about 0.3 CPU-seconds where Ray's workers are forked from a template, and 3.5 where they are not;
handing a waiting one to a model takes milliseconds. The pool keeps some ready, starts new ones in the background when
some are taken, and takes back those of models that were deleted cleanly. A process never serves two owners.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_LAST_PAUSE_SECONDS = 30.0


class PooledRank(Protocol):
    """What the pool must know of a rank. `owner` None: it has served nobody yet."""

    owner: str | None

    @property
    def alive(self) -> bool: ...

    def kill(self) -> object: ...


RankT = TypeVar("RankT", bound=PooledRank)


@dataclass(eq=False)
class _Want(Generic[RankT]):
    """Somebody who waits for `count` ranks and holds some of them already."""

    count: int
    owner: str
    done: asyncio.Future[list[RankT]]
    ranks: list[RankT] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.count - len(self.ranks)


class WarmPool(Generic[RankT]):
    """Hands out ranks in the order of asking. All methods belong to the event loop's thread.

    start: makes one rank. spare: how many to keep ready. most: no rank is started only to be ready when there would be
    more than this, those in use included. at_once: how many may start at the same time.
    """

    def __init__(self, start: Callable[[], Awaitable[RankT]], *, spare: int, most: int, at_once: int) -> None:
        self._start = start
        self._spare = spare
        self._most = most
        self._at_once = at_once
        self._ready: list[RankT] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._wants: deque[_Want[RankT]] = deque()
        self._in_use = 0
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._pause: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def ready(self) -> int:
        """How many ranks wait for a model."""
        return len(self._ready)

    def open(self) -> None:
        """Starts filling the pool, in the background."""
        self._settle()

    async def take(self, count: int, owner: str) -> list[RankT]:
        """`count` ranks for `owner`; waits for those that must be started. Raises what starting one raised."""
        want = _Want[RankT](count, owner, asyncio.get_running_loop().create_future())
        self._wants.append(want)
        self._settle()
        try:
            ranks = await want.done
        except BaseException:
            if want.done.done() and not want.done.cancelled() and want.done.exception() is None:
                self._in_use -= count
            elif want in self._wants:
                self._wants.remove(want)
            self._ready.extend(want.ranks)
            self._settle()
            raise
        for rank in ranks:
            rank.owner = owner
        return ranks

    def give_back(self, rank: RankT, *, reuse: bool) -> None:
        """Takes a rank that a model no longer needs. Without `reuse` its process ends; so it does if it is lost."""
        self._in_use -= 1
        if reuse and rank.alive and not self._closed:
            self._ready.append(rank)
        else:
            rank.kill()
        self._settle()

    def remove(self, rank: RankT) -> None:
        """Forgets a rank that died while it waited: for a model, or for the rest of one's ranks."""
        for waiting in (self._ready, *(want.ranks for want in self._waiting)):
            if rank in waiting:
                waiting.remove(rank)
                rank.kill()
                self._hold_on()
                self._settle()
                return

    async def warm(self, count: int | None = None) -> None:
        """Waits until `count` ranks are ready, or as many as the pool keeps."""
        count = min(self._spare, self._most) if count is None else min(count, self._spare, self._most)
        while len(self._ready) < count and not self._closed:
            self._changed.clear()
            await self._changed.wait()

    async def close(self) -> None:
        """Ends every rank that waits, and what is being started."""
        self._closed = True
        if self._pause:
            self._pause.cancel()
        for want in self._wants:
            want.done.cancel()
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for rank in self._ready:
            rank.kill()
        self._ready.clear()
        self._changed.set()

    def _settle(self) -> None:
        """Hands out what is ready, then starts what is missing."""
        if self._closed:
            return
        self._changed.set()
        for want in self._waiting:
            for rank in [rank for rank in self._ready if rank.owner in (None, want.owner)]:
                if not want.missing:
                    break
                self._ready.remove(rank)
                want.ranks.append(rank)
            if not want.missing:
                self._wants.remove(want)
                # Counted here, not where `take` goes on: it may run later than the next decision about spares.
                self._in_use += want.count
                want.done.set_result(want.ranks)
        self._make_room()
        self._refill()

    def _make_room(self) -> None:
        """Somebody waits, and what is ready belongs to others: the oldest of it goes."""
        missing = sum(want.missing for want in self._waiting)
        while missing and self._ready and self._held + len(self._ready) + missing > self._most:
            self._ready.pop(0).kill()

    @property
    def _waiting(self) -> list[_Want[RankT]]:
        """Whom to serve. One who has just given up is still there until `take` goes on and gives back what it got."""
        return [want for want in self._wants if not want.done.done()]

    @property
    def _held(self) -> int:
        return self._in_use + sum(len(want.ranks) for want in self._wants)

    def _refill(self) -> None:
        missing = sum(want.missing for want in self._waiting)
        room = self._most - self._held - missing - len(self._ready)
        # While somebody waits, the processors are theirs: every start beside theirs makes them wait longer.
        speculate = not missing and self._pause is None
        spares = max(0, min(self._spare - len(self._ready), room)) if speculate else 0
        for _ in range(min(missing + spares, self._at_once) - len(self._starting)):
            task = asyncio.create_task(self._start_one())
            self._starting.add(task)
            task.add_done_callback(self._started)

    async def _start_one(self) -> None:
        try:
            rank = await self._start()
        except Exception as error:
            logger.warning("a rank did not start: %s", error)
            self._hold_on()
            for want in self._waiting[:1]:
                self._wants.remove(want)
                want.done.set_exception(error)
            return
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._ready.append(rank)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        self._settle()

    def _hold_on(self) -> None:
        """Something is wrong with new ranks: none is started on mere speculation for a while, longer each time."""
        if self._pause is None and not self._closed:
            self._pause = asyncio.get_running_loop().call_later(self._pause_seconds, self._go_on)
            self._pause_seconds = min(2 * self._pause_seconds, _LAST_PAUSE_SECONDS)

    def _go_on(self) -> None:
        self._pause = None
        self._settle()
