"""Who waits for ranks gets them in the order of asking, and leaves nothing where it gives up."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from gradwire_proto.errors import ResourceExhausted
from gradwire_workers.pool.capacity import Capacity, Demand
from gradwire_workers.pool.capacity_queue import CapacityQueue, Waiting


def ranks(count: int, *, gpus: float = 0.0, owner: str = "") -> Demand:
    return Demand(ranks=count, device="cuda" if gpus else "cpu", gpus_per_rank=gpus, owner=owner)


class Asking:
    """Somebody who asks and waits, and what it was told."""

    def __init__(self, queue: CapacityQueue, demand: Demand, seconds: float = 5.0) -> None:
        self.told: list[str] = []
        waiting = Waiting(until=time.monotonic() + seconds, tell=self.told.append)
        self.task = asyncio.ensure_future(queue.claim(demand, waiting))


async def asks(queue: CapacityQueue, demand: Demand, **how: Any) -> Asking:
    asking = Asking(queue, demand, **how)
    await turns()
    return asking


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def service(workers: int, gpus: float = 0.0, most: int | None = None) -> tuple[Capacity, CapacityQueue]:
    capacity = Capacity(workers=workers, gpus=gpus, most_per_owner=most)
    return capacity, CapacityQueue(capacity)


async def test_ranks_go_to_who_has_asked_first_however_many_it_wants() -> None:
    capacity, queue = service(4)
    capacity.claim(ranks(3))
    large = await asks(queue, ranks(3))
    small = await asks(queue, ranks(1))
    with pytest.raises(ResourceExhausted, match="1 of the service's 4 are free, and others have asked before"):
        await queue.claim(ranks(1), Waiting())
    assert large.told == ["3 workers; 1 of the service's 4 are free"]
    assert small.told == ["1 workers; 1 of the service's 4 are free, and others have asked before"]
    capacity.free(ranks(3))
    await turns()
    assert large.task.done() and small.task.done() and capacity.free_workers == 0
    assert large.told[-1] == small.told[-1] == ""


async def test_what_is_told_follows_what_is_free() -> None:
    capacity, queue = service(4)
    for _ in range(4):
        capacity.claim(ranks(1))
    asking = await asks(queue, ranks(3))
    for _ in range(3):
        capacity.free(ranks(1))
    await asking.task
    free = [f"3 workers; {count} of the service's 4 are free" for count in range(3)]
    assert asking.told == [*free, ""]


async def test_who_can_never_be_served_is_refused_at_once_whatever_else_is_taken() -> None:
    capacity, queue = service(2, gpus=1.0)
    capacity.claim(ranks(2))
    for demand, words in ((ranks(3), "asks for 3 workers; 0 of the service's 2"), (ranks(2, gpus=1.0), "2 GPUs; 1 of")):
        asking = await asks(queue, demand)
        with pytest.raises(ResourceExhausted, match=words) as caught:
            await asking.task
        assert not caught.value.retryable and not asking.told


async def test_who_waits_in_vain_hears_the_numbers_and_those_behind_go_on() -> None:
    capacity, queue = service(2)
    capacity.claim(ranks(1))
    vain = await asks(queue, ranks(2), seconds=0.05)
    behind = await asks(queue, ranks(1))
    with pytest.raises(ResourceExhausted, match=r"1 of the service's 2 are free, and it has waited") as caught:
        await vain.task
    assert caught.value.reason == "WORKERS_EXHAUSTED" and caught.value.retryable
    await asyncio.wait_for(behind.task, 1.0)
    assert capacity.free_workers == 0


async def test_who_gives_up_leaves_nothing_even_at_the_moment_of_its_turn() -> None:
    capacity, queue = service(2)
    capacity.claim(ranks(2))
    first, second = await asks(queue, ranks(2)), await asks(queue, ranks(1))
    first.task.cancel()
    await turns()
    second.task.cancel()
    # Its turn comes before it hears that it was given up.
    capacity.free(ranks(2))
    await asyncio.gather(first.task, second.task, return_exceptions=True)
    assert second.task.cancelled() and capacity.free_workers == 2
    await queue.claim(ranks(2), Waiting())


async def test_an_owners_own_limit_and_missing_gpus_hold_up_nobody_else() -> None:
    capacity, queue = service(6, gpus=1.0, most=2)
    capacity.claim(ranks(2, owner="ann"))
    capacity.claim(ranks(1, gpus=1.0, owner="bob"))
    ann = await asks(queue, ranks(1, owner="ann"))
    bob = await asks(queue, ranks(1, gpus=1.0, owner="bob"))
    assert ann.told[0].startswith("1 workers; your models hold 2 of the 2") and bob.told[0].startswith("1 GPUs; 0 of")
    await queue.claim(ranks(2, owner="cy"), Waiting())
    capacity.free(ranks(1, gpus=1.0, owner="bob"))
    await bob.task
    capacity.free(ranks(2, owner="ann"))
    await ann.task
