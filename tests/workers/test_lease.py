"""What a model holds of the cluster comes back, whatever fails. Ray and the ranks here are plain objects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradwire_proto.errors import ResourceExhausted, Unavailable
from gradwire_workers.pool.capacity import Capacity, Demand
from gradwire_workers.pool.lease import Lease
from gradwire_workers.pool.warm_pool import WarmPool

TWO = Demand(ranks=2, device="cpu", gpus_per_rank=0)


class SlowToEnd:
    """A rank whose process ends only when `gate` is set."""

    def __init__(self, gate: asyncio.Event) -> None:
        self.owner: str | None = None
        self.alive = True
        self.channel = SimpleNamespace(on_lost=None)
        self._gate = gate
        self._ending: asyncio.Task[None] | None = None

    def kill(self) -> asyncio.Task[None]:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        return self._ending

    async def _end(self) -> None:
        await self._gate.wait()
        self.alive = False


class Threads:
    """In place of the launcher: calls at once what blocks."""

    async def in_thread(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    async def in_thread_briefly(self, function: Callable[..., Any], *arguments: Any) -> bool:
        function(*arguments)
        return True


class Reservations:
    """In place of Ray: what is reserved now. `error`: it reserves nothing."""

    def __init__(self) -> None:
        self.there: list[object] = []
        self.error: Exception | None = None

    def reserve(self, ranks: int, gpus_per_rank: float, *, timeout: float) -> object:
        if self.error is not None:
            raise self.error
        self.there.append(object())
        return self.there[-1]

    def free(self, reservation: object) -> None:
        self.there.remove(reservation)


class Scene:
    """Leases of a cluster of two ranks."""

    def __init__(self, folder: Path) -> None:
        self.gate = asyncio.Event()
        self.ranks: list[SlowToEnd] = []
        self.capacity = Capacity(workers=2, gpus=0)
        self.reservations = Reservations()
        self._pool: Any = WarmPool(self._start, spare=0, most=3, at_once=2)
        self._folder = folder

    async def _start(self) -> Any:
        self.ranks.append(SlowToEnd(self.gate))
        return self.ranks[-1]

    def lease(self, name: str = "m") -> Lease:
        placement: Any = self.reservations
        launcher: Any = Threads()
        return Lease(
            capacity=self.capacity,
            placement=placement,
            launcher=launcher,
            pool=self._pool,
            folder=self._folder / name,
        )


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize("error", [Unavailable("Ray is gone"), TimeoutError("no answer")])
async def test_capacity_comes_back_whatever_a_reservation_fails_of(scene, error):
    scene.reservations.error = error
    lease = scene.lease()
    with pytest.raises(type(error)):
        await lease.acquire(TWO)
    assert scene.capacity.free_workers == 0
    await lease.release(True)
    assert scene.capacity.free_workers == 2 and not lease.folder.exists()


async def test_ranks_end_though_whoever_gives_them_back_is_cancelled(scene):
    lease = scene.lease()
    await lease.acquire(TWO)
    assert scene.capacity.free_workers == 0 and scene.reservations.there
    releasing = asyncio.ensure_future(lease.release(False))
    await asyncio.sleep(0.01)
    releasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await releasing
    scene.gate.set()
    await asyncio.sleep(0.01)
    assert not any(rank.alive for rank in scene.ranks)
    assert scene.capacity.free_workers == 2


async def test_place_of_ranks_that_are_lost_is_nobody_elses_until_it_is_given_up(scene):
    scene.gate.set()
    lost, new, other = scene.lease("lost"), scene.lease("new"), scene.lease("other")
    await lost.acquire(TWO)
    (reservation,) = scene.reservations.there
    await lost.vacate()
    assert not any(rank.alive for rank in scene.ranks)
    with pytest.raises(ResourceExhausted):
        await other.acquire(TWO)
    await new.acquire(TWO, place=lost)
    assert scene.reservations.there == [reservation], "nothing is asked of Ray"
    await lost.release(False)
    assert scene.capacity.free_workers == 0 and len(new.processes) == 2
    await new.release(False)
    assert scene.capacity.free_workers == 2 and not scene.reservations.there
