"""After a rank is lost: what the others hold is taken over where it is whole, and nothing else ever is."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gradwire_proto.errors import InternalError, InvalidArgument, RankLost
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import Batch, OptimizerSpec, Retention
from gradwire_workers.rank_standing import RankStanding

pytestmark = pytest.mark.asyncio(loop_scope="session")


def batch_of(rows: int) -> Batch:
    return Batch(from_nested(torch.randn(rows, 10)), from_nested(torch.randint(0, 3, (rows,))))


def model(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(10, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 3))


@pytest.fixture
def made(make_spec):
    """A model on two ranks."""
    optimizer = OptimizerSpec("Adam", {"lr": 0.01})
    example = torch.randn(8, 10), torch.randint(0, 3, (8,))
    return make_spec(model(), nn.CrossEntropyLoss(), *example, workers=2, optimizer=optimizer)


async def lose(group, victim: int) -> None:
    """Ends a rank while the group is idle."""
    lost = asyncio.Event()
    group.on_lost = lambda _: lost.set()
    process = group._ranks.processes[victim]
    signal.pidfd_send_signal(process._end.args[0]._descriptor, signal.SIGKILL)
    await asyncio.wait_for(lost.wait(), 5)


@pytest.mark.parametrize("victim", [0, 1])
async def test_the_rank_that_is_left_is_a_source(start, bits, made, victim):
    group = await start(made)
    for command in range(1, 4):
        await group.train_step(batch_of(7), command=command)
    expected = bits(await group.state())
    await lose(group, victim)
    state = await group.salvage(3)
    await group.close(reuse=False)
    # Its files outlive the processes, all of which are gone now.
    assert bits(state) == expected


def tell(cluster, group, rank: int, kind: str, what: str) -> None:
    """What a rank does when it has carried out its next command of that kind, before it answers: see rank.py."""
    Path(cluster._config.folder, f"{group._ranks.processes[rank].name}.told").write_text(f"{kind} {what}")


@pytest.mark.parametrize(("victim", "seconds"), [(0, 0.0), (1, 0.3)])
async def test_a_step_that_a_lost_rank_has_not_answered_is_applied_where_another_has(
    start, bits, made, cluster, victim, seconds
):
    batches = [batch_of(7) for _ in range(2)]
    undisturbed = await start(made)
    expected = [await undisturbed.train_step(batch, command=number) for number, batch in enumerate(batches, 1)]
    last = bits(await undisturbed.state())
    await undisturbed.close()
    group = await start(made)
    found = [await group.train_step(batches[0], command=1)]
    tell(cluster, group, victim, "train_step", "ends")
    tell(cluster, group, 1 - victim, "train_step", str(seconds))
    found.append(await group.train_step(batches[1], command=2))
    assert [replace(each, timing=None) for each in found] == [replace(each, timing=None) for each in expected]
    assert group.rank_lost is not None and group.applied == 2
    with pytest.raises(RankLost) as lost:
        await group.train_step(batches[0], command=3)
    assert lost.value.outcome == "not_applied"
    assert bits(await group.salvage(2)) == last


async def test_a_command_of_which_each_rank_has_a_part_is_not_applied_where_one_has_not_answered(start, made, cluster):
    group = await start(made)
    tell(cluster, group, 1, "forward_backward", "ends")
    with pytest.raises(RankLost) as lost:
        await group.forward_backward(batch_of(7), command=1)
    assert lost.value.outcome == "unknown" and group.applied == 0
    assert await group.salvage(0) is None


async def test_a_rank_that_is_a_command_ahead_is_no_source_but_one_that_is_not_is(start, bits, made):
    group = await start((replace(made[0], workers=3), *made[1:]))
    await group.train_step(batch_of(7), command=1)
    expected = bits(await group.state())
    ahead = group._ranks.processes[0]
    await ahead.call("zero_grad", {"number": 2})
    await lose(group, 1)
    assert await group.salvage(3) is None
    state = await group.salvage(1)
    assert bits(state) == expected


async def test_gradients_that_a_lost_rank_held_make_the_others_no_source(start, made):
    group = await start(made)
    await group.forward_backward(batch_of(7), command=1)
    await lose(group, 1)
    assert await group.salvage(group.applied) is None


async def test_a_group_that_retains_forwards_is_no_source(start, made):
    group = await start(made)
    inputs = from_any(torch.randn(7, 10))
    assert not group.retains
    await group.retained.forward(inputs, Retention(), "f", training=True, seed=None, command=1)
    assert group.retains
    await lose(group, 1)
    assert await group.salvage(group.applied) is None


async def test_forwards_that_were_let_go_of_are_no_change_that_ranks_count(start, made):
    group = await start(made)
    await group.retained.forward(from_any(torch.randn(7, 10)), Retention(), "f", training=True, seed=None, command=1)
    await group.retained.release(["f"])
    assert group.applied == 1
    await lose(group, 1)
    assert await group.salvage(1) is not None


async def test_only_a_failure_that_put_nothing_back_tears_a_rank():
    def failing(error: Exception):
        def command(_):
            raise error

        return command

    standing = RankStanding()
    standing.carry_out(lambda _: {}, {"number": 1})
    for refusal in (InvalidArgument("no"), InternalError("a peer was lost", reason="PEER_FAILED")):
        with pytest.raises(type(refusal)):
            standing.carry_out(failing(refusal), {"number": 2})
    with pytest.raises(ZeroDivisionError):
        standing.carry_out(failing(ZeroDivisionError()), {})
    assert standing == RankStanding(applied=1, torn=False)
    for failure in (InternalError("halfway", reason="UPDATE_TORN", outcome="unknown"), ZeroDivisionError()):
        standing = RankStanding()
        with pytest.raises(type(failure)):
            standing.carry_out(failing(failure), {"number": 2})
        assert standing == RankStanding(applied=0, torn=True)


@pytest.mark.parametrize(
    ("victim", "fault", "workers"),
    [(0, signal.SIGKILL, 3), (1, signal.SIGSTOP, 2)],
)
async def test_a_model_whose_rank_is_lost_in_the_middle_of_a_step_goes_on_as_if_it_were_not(
    start, bits, drop, make_spec, process_ids, send, victim, fault, workers
):
    torch.manual_seed(3)
    example = torch.randn(8, 10), torch.randint(0, 3, (8,))
    optimizer = OptimizerSpec("Adam", {"lr": 0.01})
    made = make_spec(model(300), nn.CrossEntropyLoss(), *example, workers=workers, optimizer=optimizer, seed=2)
    batches = [batch_of(200 + number) for number in range(6)]
    group = await start(made)
    seconds, prefixes = [], []
    for command, batch in enumerate(batches, 1):
        began = time.perf_counter()
        await group.train_step(batch, command=command)
        seconds.append(time.perf_counter() - began)
        prefixes.append(bits(await group.state()))
    await group.close()

    chance = random.Random(f"{victim} {fault} {workers}")
    group, base, kept, lost = await start(made), 0, None, 0
    for command, batch in enumerate(batches, 1):
        if kept is not None:
            drop(kept)
        # As a checkpoint before each command would be: where nothing can be salvaged, the model goes on from there.
        kept = await group.state()
        step = asyncio.ensure_future(group.train_step(batch, command=command))
        if command in (2, 5):
            await asyncio.sleep(chance.random() * min(seconds))
            send(process_ids(group)[victim], fault)
        try:
            await asyncio.wait_for(asyncio.shield(step), 20)
        except RankLost:
            assert group.applied == command - 1 - base
        if command not in (2, 5):
            continue
        if group.rank_lost is None:
            await asyncio.sleep(5)
        assert group.rank_lost is not None
        lost += 1
        applied = base + group.applied
        salvaged = await group.salvage(group.applied)
        await group.close(reuse=False)
        if salvaged is not None:
            told = bits(salvaged)
            assert told == prefixes[applied - 1]
        # Also where the step was faster than the fault: it is done again from before it.
        group, base = await start(made, state=kept), command - 1
        await group.train_step(batch, command=command)
    assert lost == 2
    assert bits(await group.state()) == prefixes[-1]


async def test_a_rank_is_ended_though_ray_does_not_answer(start, plain_processes, process_ids, made):
    group = await start(made)
    names = [process.name for process in group._ranks.processes]
    plain_processes.answers = False
    try:
        began = time.monotonic()
        await group.close(reuse=False)
        assert time.monotonic() - began < 7
        for name in names:
            assert plain_processes.processes[name].ends(1)
    finally:
        plain_processes.answers = True
