"""Ranks are ready when they are wanted, and never serve two owners. The ranks here are plain objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from gradwire_proto.errors import Unavailable
from gradwire_workers.pool.warm_pool import WarmPool


class FakeRank:
    def __init__(self) -> None:
        self.owner: str | None = None
        self.alive = True

    def kill(self) -> None:
        self.alive = False


class FakeStarts:
    """Starts ranks, each as soon as it is allowed to; counts them."""

    def __init__(self) -> None:
        self.ranks: list[FakeRank] = []
        self.starting = self.most_at_once = 0
        self.broken = False
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self) -> FakeRank:
        self.starting += 1
        self.most_at_once = max(self.most_at_once, self.starting)
        try:
            await self.go_on.wait()
            await asyncio.sleep(0)
            if self.broken:
                raise Unavailable("no process")
        finally:
            self.starting -= 1
        self.ranks.append(FakeRank())
        return self.ranks[-1]

    @property
    def living(self) -> int:
        return sum(rank.alive for rank in self.ranks)


@pytest.fixture
async def starts() -> FakeStarts:
    return FakeStarts()


@pytest.fixture
async def pool_of(starts: FakeStarts) -> AsyncIterator[Callable[..., WarmPool[FakeRank]]]:
    pools: list[WarmPool[FakeRank]] = []

    def pool_of(spare: int = 2, most: int = 5, at_once: int = 2) -> WarmPool[FakeRank]:
        pools.append(WarmPool[FakeRank](starts, spare=spare, most=most, at_once=at_once))
        pools[-1].open()
        return pools[-1]

    yield pool_of
    for pool in pools:
        await pool.close()


async def test_the_pool_fills_itself_and_refills_after_a_take(pool_of, starts):
    pool = pool_of(spare=2)
    await pool.warm()
    assert (pool.ready, len(starts.ranks)) == (2, 2)
    taken = await pool.take(2, "ann")
    assert all(rank.owner == "ann" for rank in taken)
    await pool.warm()
    assert (pool.ready, len(starts.ranks)) == (2, 4)


async def test_more_than_what_is_spare_are_started_at_once(pool_of, starts):
    pool = pool_of(spare=1, most=8, at_once=3)
    assert len(await pool.take(5, "ann")) == 5
    assert starts.most_at_once == 3


async def test_spares_never_raise_the_number_of_processes_above_most(pool_of, starts):
    pool = pool_of(spare=2, most=3)
    await pool.take(2, "ann")
    await asyncio.sleep(0.01)
    assert len(starts.ranks) == 3


async def test_twenty_models_in_a_row_share_the_processes_of_the_first(pool_of, starts):
    pool = pool_of(spare=2, most=5)
    for _ in range(20):
        for rank in await pool.take(2, "ann"):
            pool.give_back(rank, reuse=True)
    assert len(starts.ranks) <= 4


async def test_a_rank_never_serves_a_second_owner(pool_of, starts):
    pool = pool_of(spare=1, most=2)
    (first,) = await pool.take(1, "ann")
    pool.give_back(first, reuse=True)
    for _ in range(2):
        (other,) = await pool.take(1, "bob")
        assert other is not first
    (again,) = await pool.take(1, "ann")
    assert again is first or not first.alive


async def test_idle_ranks_of_another_owner_make_room(pool_of, starts):
    pool = pool_of(spare=0, most=2)
    for rank in await pool.take(2, "ann"):
        pool.give_back(rank, reuse=True)
    assert len(await pool.take(2, "bob")) == 2
    assert starts.living == 2


async def test_ranks_that_are_not_reusable_or_dead_end(pool_of, starts):
    pool = pool_of(spare=0)
    bad, dead = await pool.take(2, "ann")
    dead.alive = False
    pool.give_back(bad, reuse=False)
    pool.give_back(dead, reuse=True)
    assert not bad.alive
    assert pool.ready == 0


async def test_a_spare_that_dies_is_replaced(pool_of, starts):
    pool = pool_of(spare=1)
    await pool.warm()
    pool.remove(starts.ranks[0])
    (rank,) = await pool.take(1, "ann")
    assert rank is not starts.ranks[0]


async def test_when_ranks_do_not_start_the_taker_is_told_and_the_pool_rests(pool_of, starts):
    starts.broken = True
    pool = pool_of(spare=1)
    with pytest.raises(Unavailable, match="no process"):
        await pool.take(1, "ann")
    starts.broken = False
    await asyncio.sleep(0.01)
    assert not starts.ranks, "nothing is started on speculation right after a failure"
    assert len(await pool.take(1, "ann")) == 1


async def test_a_taker_who_gives_up_leaves_the_ranks_to_others(pool_of, starts):
    pool = pool_of(spare=1, most=3)
    await pool.warm()
    starts.go_on.clear()
    waiting = asyncio.create_task(pool.take(3, "ann"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert len(await pool.take(1, "bob")) == 1


async def test_a_taker_who_gives_up_in_the_last_moment_leaves_the_ranks_too(pool_of, starts):
    pool = pool_of(spare=1, most=1)
    await pool.warm()
    waiting = asyncio.create_task(pool.take(1, "ann"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert len(await pool.take(1, "bob")) == 1


async def test_a_rank_that_comes_just_when_its_taker_gives_up_goes_to_others(pool_of, starts):
    pool = pool_of(spare=0, most=2)
    (rank,) = await pool.take(1, "ann")
    starts.go_on.clear()
    waiting = asyncio.create_task(pool.take(1, "ann"))
    await asyncio.sleep(0)
    waiting.cancel()
    # `take` has not gone on yet: what it wants is still in the queue.
    pool.give_back(rank, reuse=True)
    await asyncio.gather(waiting, return_exceptions=True)
    assert await asyncio.wait_for(pool.take(1, "ann"), 1) == [rank]
    starts.go_on.set()
    await asyncio.wait_for(pool.take(1, "ann"), 1)


async def test_closing_ends_every_waiting_rank(pool_of, starts):
    pool = pool_of(spare=2)
    await pool.warm()
    (taken,) = await pool.take(1, "ann")
    await pool.close()
    pool.give_back(taken, reuse=True)
    assert starts.living == 0


async def test_a_rank_that_dies_while_its_taker_waits_for_others_is_replaced(pool_of, starts):
    pool = pool_of(spare=1)
    pool.open()
    await pool.warm()
    starts.go_on.clear()
    taking = asyncio.ensure_future(pool.take(2, "m"))
    await asyncio.sleep(0)
    (first,) = starts.ranks
    first.kill()
    pool.remove(first)
    starts.go_on.set()
    taken = await taking
    assert len(taken) == 2 and all(rank.alive for rank in taken)
