"""Ranks that are lost while a model is made, and the ranks that are kept ready for it."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
import torch
from torch import nn

from gradwire_proto.errors import RankLost
from gradwire_workers import cluster as cluster_module

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("times", [1, 2])
async def test_rank_that_is_lost_while_a_model_is_made_is_replaced_once(
    start, cluster, make_spec, process_ids, send, monkeypatch, times
):
    made = make_spec(nn.Linear(10, 3), nn.CrossEntropyLoss(), torch.randn(4, 10), torch.randint(0, 3, (4,)), workers=2)
    prepare, killed = cluster_module.WorkerGroup.prepare, []

    async def prepare_after_a_loss(group: Any, example: Any) -> None:
        if len(killed) < times:
            killed.append(process_ids(group)[1])
            send(killed[-1], signal.SIGKILL)
        await prepare(group, example)

    monkeypatch.setattr(cluster_module.WorkerGroup, "prepare", prepare_after_a_loss)
    if times == 1:
        group = await start(made)
        assert group.rank_lost is None and group.workers == 2
        return
    with pytest.raises(RankLost) as lost:
        await start(made)
    assert lost.value.outcome == "not_applied"
    assert cluster.capacity.free_workers == 3


async def test_all_spare_ranks_are_kept_while_models_hold_every_other(start, cluster, make_spec):
    made = make_spec(nn.Linear(10, 3), nn.CrossEntropyLoss(), torch.randn(4, 10), torch.randint(0, 3, (4,)), workers=3)
    await start(made)
    async with asyncio.timeout(60):
        await cluster.warm()


async def test_closed_group_gives_back_what_it_held_though_whoever_closes_it_is_cancelled(start, cluster, make_spec):
    made = make_spec(nn.Linear(10, 3), nn.CrossEntropyLoss(), torch.randn(4, 10), torch.randint(0, 3, (4,)), workers=2)
    group = await start(made)
    assert cluster.capacity.free_workers == 1
    closing = asyncio.ensure_future(group.close(reuse=False))
    await asyncio.sleep(0)
    closing.cancel()
    async with asyncio.timeout(20):
        while cluster.capacity.free_workers < 3:
            await asyncio.sleep(0.05)


async def test_capacity_of_lost_ranks_is_kept_for_those_that_replace_them_until_the_group_is_closed(
    start, cluster, make_spec, process_ids, send, monkeypatch
):
    made = make_spec(nn.Linear(10, 3), nn.CrossEntropyLoss(), torch.randn(4, 10), torch.randint(0, 3, (4,)), workers=2)
    spec = made[0]
    lost = await start(made)
    state = await lost.state()
    await lost.vacate()
    assert cluster.capacity.free_workers == 1
    resume = cluster_module.WorkerGroup.resume
    monkeypatch.setattr(cluster_module.WorkerGroup, "resume", fail)
    with pytest.raises(OSError, match="no room"):
        await cluster.start_group(spec, state.tensors, None, model_id="m", state=state, place=lost)
    assert cluster.capacity.free_workers == 1, "it was given back to whom it is kept for"
    monkeypatch.setattr(cluster_module.WorkerGroup, "resume", resume)
    group = await cluster.start_group(spec, state.tensors, None, model_id="m", state=state, place=lost)
    await lost.close(reuse=False)
    assert cluster.capacity.free_workers == 1 and group.rank_lost is None
    await group.close()
    assert cluster.capacity.free_workers == 3


def fail(*_: Any) -> None:
    raise OSError("no room")
