"""What one model holds of the cluster: capacity, a reservation in Ray, ranks, and a folder where they meet."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from gradwire_proto.errors import RankLost
from gradwire_workers.placement import Placement, Reservation
from gradwire_workers.pool.capacity import Capacity, Demand
from gradwire_workers.pool.rank_launcher import RankLauncher
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.pool.warm_pool import WarmPool

_SECONDS_TO_RESERVE = 20.0

Claim: TypeAlias = Callable[[Demand], Awaitable[None]]


class Lease:
    """See the module. Nothing is held before `acquire`, nor after `release`."""

    def __init__(
        self,
        *,
        capacity: Capacity,
        placement: Placement,
        launcher: RankLauncher,
        pool: WarmPool[RankProcess],
        folder: Path,
    ) -> None:
        self.folder = folder
        self.processes: Sequence[RankProcess] = ()
        self._capacity = capacity
        self._placement = placement
        self._launcher = launcher
        self._pool = pool
        self._demand: Demand | None = None
        self._reserving: asyncio.Future[Reservation] | None = None

    async def acquire(self, demand: Demand, *, place: Lease | None = None, claim: Claim | None = None) -> None:
        """Takes what the model needs, or fails and holds what it got until `release`.

        place: one whose ranks have left. What it holds beside them is taken over, where it is as much. claim: takes the
        demand out of the capacity in its turn; None: at once, before those who wait.
        """
        self.folder.mkdir(mode=0o700, parents=True)
        if place is not None and place._demand == demand:
            place.hand_over(self)
        if self._demand is None:
            await self._claim(demand, claim)
        self.processes = await self._pool.take(demand.ranks, demand.owner)

    async def _claim(self, demand: Demand, claim: Claim | None) -> None:
        if claim is None:
            self._capacity.claim(demand)
        else:
            await claim(demand)
        self._demand = demand
        self._reserving = asyncio.ensure_future(
            self._launcher.in_thread(
                self._placement.reserve, demand.ranks, demand.gpus_per_rank, timeout=_SECONDS_TO_RESERVE
            )
        )
        # A caller who gives up must not lose sight of what Ray reserves all the same.
        await asyncio.shield(self._reserving)

    def hand_over(self, other: Lease) -> None:
        """Let the other, where it holds nothing, hold what this has reserved."""
        reserving = self._reserving
        if other._demand is None and reserving is not None and reserving.done() and not reserving.exception():
            other._demand, self._demand = self._demand, None
            other._reserving, self._reserving = reserving, None

    async def vacate(self, reuse: bool = False) -> None:
        """Gives the ranks back, as `release` does, and nothing else: others will take their place."""
        processes, self.processes = self.processes, ()
        await asyncio.gather(*(self._give_back(process, reuse) for process in processes))

    def gpu_ids(self, rank: int) -> tuple[str, ...]:
        """The GPUs that this rank may see; none on the CPU."""
        assert self._reserving is not None
        ids = self._reserving.result().gpu_ids
        return ids[rank] if ids else ()

    async def release(self, reuse: bool) -> None:
        """Gives everything back. With `reuse`, ranks that can be made as good as new go on to other models."""
        reserving, self._reserving = self._reserving, None
        demand, self._demand = self._demand, None
        try:
            await self.vacate(reuse)
            if reserving is not None:
                # A reservation that failed was heard of where it was asked for.
                with contextlib.suppress(Exception):
                    await self._launcher.in_thread_briefly(self._placement.free, await reserving)
            await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        finally:
            if demand is not None:
                self._capacity.free(demand)

    async def _give_back(self, process: RankProcess, reuse: bool) -> None:
        reusable = reuse and await _reset(process)
        process.channel.on_lost = lambda _: self._pool.remove(process)
        self._pool.give_back(process, reuse=reusable)
        if not reusable:
            # Whoever waits for it may be cancelled; its end must not be.
            await asyncio.shield(process.kill())


async def _reset(process: RankProcess) -> bool:
    try:
        answer = await process.call("reset")
    except RankLost:
        return False
    return answer.error is None and answer.fields["reusable"]
