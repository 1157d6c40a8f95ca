"""Several steps handed to all ranks at once, and what comes of each: a step counts when every rank has applied it.

Once a rank is lost, it counts where any has: see `Ranks.call`, of commands of which any answer will do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradwire_workers.rank_channel import Answer
from gradwire_workers.ranks import Ranks
from gradwire_workers.step_rows import StepRow

Took = Callable[[Sequence[Sequence[StepRow]], float], None]
"""Called with the rows of the next steps that were applied, of each rank that told, and the seconds that no rank was at
work on each of them."""


class StepDispatch:
    """One dispatch to `ranks`. Nothing else may be asked of them meanwhile."""

    def __init__(self, ranks: Ranks, took: Took) -> None:
        self._ranks = ranks
        self._took = took
        self._rows: list[deque[StepRow]] = [deque() for _ in range(len(ranks))]
        self._woken: asyncio.Future[None] | None = None
        self._marked = 0.0

    async def run(self, fields: Sequence[Mapping[str, Any]]) -> None:
        """Hand the ranks their fields, and return when every step is applied.

        Raises the error of the first step that was not, as `Ranks.call` does; those before it count.
        """
        loop = asyncio.get_running_loop()
        self._marked = loop.time()
        calls = self._ranks.begin("train_steps", fields, [each.extend for each in self._rows], self._wake)
        try:
            await self._until_over(calls)
        except BaseException:
            self._ranks.abandon("train_steps", calls)
            raise
        if self._ranks.lost is not None:
            self._take(max(map(len, self._rows)))
        await self._ranks.end("train_step", calls, even=not any(self._rows))

    async def _until_over(self, calls: Sequence[asyncio.Future[Answer]]) -> None:
        # Where one has failed, the others do at their next collective, however long they take to come to it.
        while True:
            self._take(min(map(len, self._rows)))
            if all(call.done() for call in calls):
                return
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def _take(self, count: int) -> None:
        """So many more steps are applied."""
        if not count:
            return
        steps = [[of_rank.popleft() for of_rank in self._rows if of_rank] for _ in range(count)]
        now = asyncio.get_running_loop().time()
        busy = sum(max(row.busy for row in of_ranks) for of_ranks in steps)
        idle, self._marked = max(0.0, now - self._marked - busy) / count, now
        self._ranks.applied += count
        self._took(steps, idle)
