"""Ranks come and go with their models, and nothing of them stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import alive
from torch import nn

from gradwire_proto.errors import InvalidArgument, RankLost, ResourceExhausted
from gradwire_proto.values import OptimizerSpec
from gradwire_workers.placement import Placement

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

X, Y = torch.randn(6, 10), torch.randn(6, 3)


def rank_ids(group) -> list[int]:
    return [process.process_id for process in group._ranks.processes]


async def gone(pid: int) -> bool:
    """Whether the process ends, within a moment. One that its parent has not yet looked after is gone too."""
    deadline = time.monotonic() + 3
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def files_held(memory_folder: Path, cluster_config) -> tuple[list[str], list[str]]:
    folder = Path(cluster_config.folder)
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir()), sorted(os.listdir(memory_folder))


def descriptors_and_threads() -> tuple[int, int]:
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


async def test_twenty_models_in_a_row_leave_everything_as_it_was(
    cluster, specify, in_batch, memory_folder, cluster_config
):
    spec, tensors, example = specify(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=2)
    processes, seconds = set(), []
    for number in range(20):
        started = time.perf_counter()
        group = await cluster.start_group(spec, tensors, example, model_id=f"m{number}")
        seconds.append(time.perf_counter() - started)
        processes.update(rank_ids(group))
        assert (await group.train_step(in_batch(X, Y), command=1)).step == 1
        await group.close()
        if number == 4:
            files, (descriptors, threads) = files_held(memory_folder, cluster_config), descriptors_and_threads()
    print("seconds to create:", [round(value, 3) for value in seconds])
    assert files_held(memory_folder, cluster_config) == files
    # Fewer than one a model: thread pools may still be growing to their bounds, and Ray opens sockets as it likes.
    descriptors_now, threads_now = descriptors_and_threads()
    assert descriptors_now < descriptors + 15
    assert threads_now < threads + 15
    assert len(processes) <= 5, "ranks of deleted models serve again"
    assert cluster.capacity.free_workers == 4


async def test_what_exceeds_the_capacity_is_refused_at_once(cluster, start, specify):
    await start(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=2)
    spec, tensors, example = specify(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=3)
    started = time.perf_counter()
    with pytest.raises(ResourceExhausted, match="asks for 3 workers; 2 of the service's 4 are free") as caught:
        await cluster.start_group(spec, tensors, example, model_id="m")
    assert caught.value.field == "model.workers"
    assert time.perf_counter() - started < 1.0


async def test_a_model_that_the_ranks_refuse_leaves_their_processes_for_others(cluster, start):
    free = cluster.capacity.free_workers
    with pytest.raises(InvalidArgument):
        await start(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=2, optimizer=OptimizerSpec("SGD", {"lr": -1.0}))
    assert cluster.capacity.free_workers == free
    await start(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=2)


async def test_a_rank_killed_while_idle_is_noticed_within_two_seconds(start, in_batch):
    group = await start(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=2)
    lost = asyncio.Event()
    group.on_lost = lambda _: lost.set()
    os.kill(rank_ids(group)[1], signal.SIGKILL)
    await asyncio.wait_for(lost.wait(), 2)
    with pytest.raises(RankLost) as caught:
        await group.train_step(in_batch(X, Y), command=1)
    assert caught.value.outcome == "not_applied"


async def test_a_rank_killed_in_the_middle_of_a_step_ends_the_step_within_two_seconds(start, in_batch):
    wide = nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 1500))
    x = torch.randn(4000, 1500)
    group = await start(wide, nn.MSELoss(), x[:2], x[:2], workers=2)
    survivor, victim = rank_ids(group)
    step = asyncio.create_task(group.train_step(in_batch(x, x), command=1))
    await asyncio.sleep(0.3)
    assert not step.done(), "the step is too short to be interrupted"
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankLost) as caught:
        await step
    assert time.monotonic() - started < 2
    assert caught.value.outcome == "unknown"
    await group.close()
    assert await gone(survivor), "a rank that was in a failed group never serves again"


async def test_a_spare_that_is_killed_is_replaced(cluster):
    await cluster.warm()
    (spare, *_) = cluster._pool._ready
    os.kill(spare.process_id, signal.SIGKILL)
    await asyncio.sleep(0.5)
    assert spare not in cluster._pool._ready
    await asyncio.wait_for(cluster.warm(), 60)


async def test_idle_ranks_use_no_processor(cluster, start):
    group = await start(nn.Linear(10, 3), nn.MSELoss(), X, Y, workers=2)
    await cluster.warm()
    await asyncio.sleep(1.5)  # what went before ends
    ranks = [psutil.Process(pid) for pid in rank_ids(group)]

    def seconds() -> float:
        return sum(rank.cpu_times().user + rank.cpu_times().system for rank in ranks)

    before = seconds()
    await asyncio.sleep(3)
    # Ray's own threads take about 1%; one thread that polls would take many times that.
    assert seconds() - before < 0.2


async def test_ranks_end_with_their_frontend_or_when_the_next_one_starts(cluster_config, tmp_path):
    (tmp_path / "f").mkdir()

    async def frontend(what: str) -> tuple[subprocess.Popen[str], int]:
        where = [cluster_config.address, "gradwire-other", str(tmp_path / "f"), str(tmp_path / "memory"), what]
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("frontend.py"), *where], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, int(await asyncio.to_thread(process.stdout.readline))

    first, orphan = await frontend("abandon")
    first.kill()
    first.communicate()
    second, rank = await frontend("serve")
    assert await gone(orphan), "a frontend that starts kills what an earlier one left"
    assert alive(rank)
    second.kill()
    second.communicate()
    assert await gone(rank), "a rank leaves when its frontend is gone"


async def test_a_reservation_gives_each_rank_gpus_of_its_own(cluster, cluster_config):
    placement = Placement(cluster_config.address, "gradwire-test")
    reservation = await asyncio.to_thread(placement.reserve, 2, 1.0, timeout=20)
    await asyncio.to_thread(placement.free, reservation)
    assert sorted(reservation.gpu_ids) == [("0",), ("1",)]
