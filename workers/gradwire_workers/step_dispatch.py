"""Steps handed to all ranks, message after message, and what comes of each: a step counts when every rank has applied
it.

The next message is sent while the ranks are at the one before, so that they go on without a pause. Where a step of that
one fails, they refuse all of the next.

Once a rank is lost, a step counts where any has applied it: see `Ranks.call`, of commands of which any answer will do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from gradwire_proto.errors import RankLost
from gradwire_workers.frames import Encoded
from gradwire_workers.rank_channel import Answer
from gradwire_workers.ranks import Ranks
from gradwire_workers.step_rows import StepRow

Took = Callable[[Sequence[Sequence[StepRow]], float], None]
"""Called with the rows of the next steps that were applied, of each rank that told, and the seconds that no rank was at
work on each of them. At once, as the ranks tell: it must not take long."""


class StepDispatch:
    """Messages to `ranks`. Nothing else may be asked of them before `ended` returns. `unanswered`: steps that were
    sent, and not told of yet.
    """

    def __init__(self, ranks: Ranks, took: Took) -> None:
        self.unanswered = 0
        self._ranks = ranks
        self._took = took
        self._rows: list[deque[StepRow]] = [deque() for _ in range(len(ranks))]
        self._messages: deque[list[asyncio.Future[Answer]]] = deque()
        """Without the first ones that went well."""
        self._last_count = 0
        self._marked = 0.0
        self._defect: BaseException | None = None
        """What `took` has raised."""

    @property
    def is_under_way(self) -> bool:
        """Whether the ranks are at a message, so that the next one follows on it."""
        return self._first_under_way() is not None

    def _first_under_way(self) -> asyncio.Future[Answer] | None:
        for message in self._messages:
            for call in message:
                if not call.done():
                    return call
        return None

    @property
    def has_room(self) -> bool:
        """Whether another message should be sent now: of those before, only half of the last one is left."""
        if self.unanswered > max(1, self._last_count // 2) or self._defect is not None:
            return False
        return self._ranks.lost is None and not any(map(_has_failed, self._messages))

    def send(self, fields: Sequence[Encoded], count: int) -> None:
        """Hand each rank its fields, of so many steps. RankLost where a rank was lost before."""
        if not self.unanswered:
            self._marked = asyncio.get_running_loop().time()
        calls = self._ranks.begin("train_steps", fields, [partial(self._told, rows) for rows in self._rows])
        while self._messages and _went_well(self._messages[0]):
            self._messages.popleft()
        self._messages.append(calls)
        self.unanswered += count
        self._last_count = count

    async def ended(self) -> None:
        """Return when every step that was sent is applied; while it waits, more may be sent.

        Raises the error of the first step that was not, as `Ranks.call` does; those before it count.
        """
        try:
            # Where one has failed, the others do at their next collective, however long they take to come to it.
            while (call := self._first_under_way()) is not None:
                with suppress(RankLost):
                    await call
        except BaseException:
            self._ranks.abandon("train_steps")
            if self._defect is None:
                raise
        if self._defect is not None:
            raise self._defect
        if self._ranks.lost is not None:
            self._take(max(map(len, self._rows)))
        await self._ranks.end("train_step", self._messages, even=not any(self._rows))

    def _told(self, of_rank: deque[StepRow], rows: list[StepRow]) -> None:
        of_rank.extend(rows)
        if self._defect is None:
            try:
                self._take(min(map(len, self._rows)))
            except BaseException as error:
                self._defect = error
                self._ranks.abandon("train_steps")

    def _take(self, count: int) -> None:
        """So many more steps are applied."""
        if not count:
            return
        steps = [[of_rank.popleft() for of_rank in self._rows if of_rank] for _ in range(count)]
        now = asyncio.get_running_loop().time()
        busy = sum(max(row.busy for row in of_ranks) for of_ranks in steps)
        idle, self._marked = max(0.0, now - self._marked - busy) / count, now
        self._ranks.applied += count
        self.unanswered -= count
        self._took(steps, idle)


def _has_failed(message: Sequence[asyncio.Future[Answer]]) -> bool:
    return any(call.done() and not _is_well(call) for call in message)


def _went_well(message: Sequence[asyncio.Future[Answer]]) -> bool:
    return all(call.done() and _is_well(call) for call in message)


def _is_well(call: asyncio.Future[Answer]) -> bool:
    return not call.cancelled() and call.exception() is None and call.result().error is None
