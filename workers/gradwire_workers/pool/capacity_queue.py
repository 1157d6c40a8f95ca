"""Models that wait until what they ask for is free, in the order of asking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from gradwire_proto.errors import ResourceExhausted
from gradwire_workers.pool.capacity import Capacity, Demand


@dataclass(eq=False, slots=True, kw_only=True)
class Waiting:
    """How long a demand may wait, and who is told for what. until: on time.monotonic(); None: not at all.

    tell: called with words such as "2 workers; 1 of the service's 4 are free", when it begins to wait and when they
    change, and with "" when it waits no more.
    """

    until: float | None = None
    tell: Callable[[str], None] = lambda _: None


@dataclass(eq=False, slots=True, kw_only=True)
class _Waiter:
    demand: Demand
    waiting: Waiting
    refusal: ResourceExhausted
    """Why it waits."""
    # Not a future: one whose awaiting was cancelled could not be served any more, a moment before that is heard of.
    served: asyncio.Event = field(default_factory=asyncio.Event)


class CapacityQueue:
    """Nobody takes what one waits for who has asked before, whether it would wait or not.

    Who waits for its own owner's models to go holds up nobody, and who waits for GPUs only those who want GPUs or need
    the ranks beside them. What was served before and comes back does not ask here: it comes first.
    """

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._waiters: list[_Waiter] = []
        capacity.on_freed = self._serve

    async def claim(self, demand: Demand, waiting: Waiting) -> None:
        """Take the demand out of what is free, once it is. See `Capacity.claim` for what is raised.

        That is raised at once where it can never fit, and in the end where it waits in vain.
        """
        try:
            self._capacity.claim(demand, self._ahead_of(None))
            return
        except ResourceExhausted as error:
            if waiting.until is None or not error.retryable:
                raise
            waiter = _Waiter(demand=demand, waiting=waiting, refusal=error)
        self._waiters.append(waiter)
        waiting.tell(_words(waiter.refusal))
        try:
            async with asyncio.timeout_at(waiting.until):
                await waiter.served.wait()
        except TimeoutError:
            if not waiter.served.is_set():
                message = f"{waiter.refusal.message}, and it has waited as long as it was to"
                raise ResourceExhausted(message, **waiter.refusal.attributes()) from None
        except asyncio.CancelledError:
            if waiter.served.is_set():
                # Whoever asked had gone by the time that its turn came.
                self._capacity.free(demand)
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._serve()
            waiting.tell("")

    def _serve(self) -> None:
        """Something is free, or one has gone: give those who wait what they can have now."""
        for waiter in tuple(self._waiters):
            try:
                self._capacity.claim(waiter.demand, self._ahead_of(waiter))
            except ResourceExhausted as refusal:
                before, waiter.refusal = _words(waiter.refusal), refusal
                if _words(refusal) != before:
                    waiter.waiting.tell(_words(refusal))
                continue
            self._waiters.remove(waiter)
            waiter.served.set()

    def _ahead_of(self, waiter: _Waiter | None) -> list[Demand]:
        """What those wait for who come before this one, None: before all who come now."""
        index = len(self._waiters) if waiter is None else self._waiters.index(waiter)
        return [each.demand for each in self._waiters[:index] if self._capacity.is_within_quota(each.demand)]


def _words(refusal: ResourceExhausted) -> str:
    return refusal.message.removeprefix("asks for ")
