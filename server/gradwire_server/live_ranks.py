"""The ranks that a model has now: when some are lost, others take their place, and what they were at runs again."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gradwire_proto.errors import GradwireError, RankLost
from gradwire_server.failures import public_error
from gradwire_server.stored_replies import kills_ranks
from gradwire_server.workers import Workers

T = TypeVar("T")

KILLS = 2
"""How often ranks are lost in the middle of a command: that is to blame then."""

LOSSES = 8
"""How often they are lost, one time after the other, where most of it is not the command's doing."""


class LiveRanks:
    """See the module. All methods but `leave` belong to the turn of a request.

    `regain(lost, salvage)` gives the model new ranks, with `adopt`, or raises why it has none any more; `salvage`:
    whether what the old ones still have can be trusted. `lost_idle` is called, on the event loop, when ranks are lost:
    somebody should call `ensure` in a turn.
    """

    def __init__(
        self, regain: Callable[[RankLost, bool], Awaitable[None]], lost_idle: Callable[[RankLost], None]
    ) -> None:
        self._regain = regain
        self._lost_idle = lost_idle
        self._workers: Workers | None = None
        self._lost: RankLost | None = None
        self._left = False
        self._without = 0.0
        self._without_since: float | None = None
        self.applied = 0
        """What the ranks counted when the last request ended: whoever counted more was in the middle of one."""

    @property
    def workers(self) -> Workers:
        """The ranks, as they are now."""
        assert self._workers is not None, "a model that is served has ranks"
        return self._workers

    @property
    def there(self) -> bool:
        """Whether there are ranks, lost or not."""
        return self._workers is not None

    @property
    def seconds_without(self) -> float:
        """For how long, all in all, the model has been without the ranks that it should have."""
        since = self._without_since
        return self._without if since is None else self._without + time.monotonic() - since

    def adopt(self, workers: Workers) -> None:
        """These are the model's ranks from now on."""
        self._workers, self._lost, self.applied = workers, None, workers.applied
        workers.on_lost = lambda lost: self._note(workers, lost)

    def caught_up(self) -> None:
        """The ranks are at the model's last command: some may have been applied to them once more."""
        self.applied = self.workers.applied

    def _note(self, workers: Workers, lost: RankLost) -> None:
        if workers is self._workers:
            self._lost = lost
            self._lost_idle(lost)

    def leave(self) -> None:
        """What becomes of the ranks matters no more."""
        self._left = True
        if self._workers is not None:
            self._workers.on_lost = None

    async def ensure(self) -> None:
        """Return when no rank is lost."""
        if self._lost is not None:
            await self._replace(self._lost, True)

    async def _replace(self, lost: RankLost, salvage: bool) -> None:
        self._without_since = time.monotonic()
        try:
            await self._regain(lost, salvage)
        finally:
            self._without, self._without_since = self.seconds_without, None

    async def run(
        self, work: Callable[[], Awaitable[T]], *, changes: bool, request_id: str | None = None, kills: int = 0
    ) -> T:
        """What `work` returns, on ranks of which none is lost. `changes`: whether it changes the model. kills: how
        often it has lost the ranks already.

        Raises what `work` raises, where the model is as before, and InvalidArgument COMMAND_KILLS_RANKS where it loses
        the ranks twice. Ranks that are lost before it has reached them are not its own doing: RankLost, outcome
        "not_applied", where that happens again and again.
        """
        await self.ensure()
        losses = 0
        while True:
            try:
                return await self._try(work, changes, request_id)
            except RankLost as error:
                if self._left:
                    raise
                lost = error
            await self._replace(lost, True)
            losses, kills = losses + 1, kills + (lost.outcome != "not_applied")
            if kills == KILLS:
                raise kills_ranks(f"it ended the processes of its ranks twice ({lost}), and was not applied")
            if losses == LOSSES:
                raise RankLost(lost.message, reason=lost.reason, retryable=True, outcome="not_applied")

    async def run_together(self, work: Callable[[], Awaitable[None]]) -> RankLost | None:
        """Several commands at once, which change the model; `work` calls `caught_up` for what was applied. How ranks
        were lost meanwhile, if they were; they are back, as after what was noted: the rest should be tried again one by
        one. That loss is counted against none of them here: ranks tell of several at once, so that nobody knows which
        of the rest they were at.

        Raises what `work` raises, where the model is as after what was noted.
        """
        await self.ensure()
        try:
            await self._try(work, True, None)
        except RankLost as error:
            if self._left:
                raise
            lost = error
        else:
            return None
        await self._replace(lost, True)
        return lost

    async def _try(self, work: Callable[[], Awaitable[T]], changes: bool, request_id: str | None) -> T:
        try:
            result = await work()
            self.caught_up()
            return result
        except RankLost:
            raise
        except Exception as error:
            if not changes or (isinstance(error, GradwireError) and error.outcome != "unknown"):
                self.caught_up()
                raise
            refusal = public_error(error, request_id, outcome="unknown")
        # Nobody knows what it left behind: no rank's state can be trusted.
        await self._replace(RankLost(f"a command failed halfway: {refusal}", outcome="unknown"), False)
        refusal.outcome = "not_applied"
        raise refusal


class Wait:
    """How long a request waits from now on: `queue` seconds for its turn, `recovery` for ranks that were lost.

    Ranks are lost while others run, or none does, too: whoever waits then waits for that, not for its turn.
    """

    __slots__ = ("_came", "_ranks", "_without", "queue")

    def __init__(self, ranks: LiveRanks) -> None:
        self._ranks = ranks
        self._came = time.monotonic()
        self._without = ranks.seconds_without
        self.queue = 0.0

    def turn_begins(self) -> None:
        """It is its turn now."""
        self.queue = max(0.0, time.monotonic() - self._came - self.recovery)

    @property
    def recovery(self) -> float:
        """For how long it has waited until now for ranks that were lost, before its turn and in it."""
        return self._ranks.seconds_without - self._without
