"""Ranks that are lost, by chance or for a reason: whom that is blamed on, and where the model's state comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2


async def replaced(frontend: Any, old: Any) -> Any:
    """The ranks that have taken the place of `old`, once the model is there again."""
    hosted = frontend.tenant._models._hosted["m"]
    await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
    await frontend.until(lambda: hosted.description.info.state != "recovering")
    assert (await frontend.model()).state == model_pb2.MODEL_STATE_READY
    return frontend.cluster.groups["m"]


def dies_early(cluster: Any, monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> None:
    """The next ranks are lost before a command reaches them; with `always`, those after them, too."""
    start_group, started = cluster.start_group, len(cluster.started)

    async def lost_before(*_: Any, **__: Any) -> None:
        raise RankLost("rank 1 died", outcome="not_applied")

    async def start(*arguments: Any, **named: Any) -> Any:
        group = await start_group(*arguments, **named)
        if always or len(cluster.started) == started + 1:
            group.train_step = lost_before
        return group

    monkeypatch.setattr(cluster, "start_group", start)


async def test_ranks_lost_before_a_command_reached_them_are_not_blamed_on_it(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await frontend.create()
    dies_early(frontend.cluster, monkeypatch)
    old.error = RankLost("rank 0 died", outcome="unknown")
    assert (await frontend.stub.TrainStep(frontend.train(b"a"))).result.step == 1
    assert len(frontend.cluster.started) == 3


async def test_command_that_never_reaches_its_ranks_ends_and_may_be_tried_again(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await frontend.create()
    request = frontend.train(b"a", request_id=fakes.request_id())
    with monkeypatch.context() as patch:
        dies_early(frontend.cluster, patch, always=True)
        old.error = RankLost("rank 0 died", outcome="unknown")
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert (error.reason, error.outcome, error.retryable) == ("RANK_LOST", "not_applied", True)
    last = frontend.cluster.groups["m"]
    last.on_lost(RankLost("rank 0 died"))
    await replaced(frontend, last)
    assert (await frontend.stub.TrainStep(request)).result.step == 1


async def test_ranks_to_which_a_journal_was_applied_are_asked_for_their_state_when_one_is_lost(
    start: Callable[..., Any],
) -> None:
    async with start() as frontend:
        old = await frontend.create()
        for batch in (b"a", b"b", b"c"):
            await frontend.stub.TrainStep(frontend.train(batch))
        old.on_lost(RankLost("rank 0 died"))
        again = await replaced(frontend, old)
        again.on_lost(RankLost("rank 0 died"))
        await replaced(frontend, again)
        assert (old.salvaged, again.salvaged) == ([3], [3])
    async with start() as frontend:
        await frontend.until(lambda: frontend.tenant._models._hosted["m"].description.info.state == "ready")
        old = frontend.cluster.groups["m"]
        old.on_lost(RankLost("rank 0 died"))
        await replaced(frontend, old)
        assert old.salvaged == [3]


@pytest.mark.parametrize("durability", ["none", "process"])
async def test_salvaged_state_is_kept_for_as_long_as_ranks_are_lost_while_they_are_started(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    monkeypatch.setattr("gradwire_server.restoring.FIRST_PAUSE", 0.001)
    monkeypatch.setattr("gradwire_server.restoring.LONGEST_PAUSE", 0.001)
    async with start() as frontend:
        old = await frontend.create(durability=durability)
        await frontend.stub.TrainStep(frontend.train(b"a"))
        old.kept = old.now()
        frontend.cluster.error = RankLost("a rank died while it was started", outcome="not_applied")
        old.on_lost(RankLost("rank 0 died"))
        await frontend.until(lambda: frontend.cluster.tries > 12)
        frontend.cluster.error = None
        new = await replaced(frontend, old)
        assert (new.step, new.calls) == (1, [])


async def test_whoever_waits_for_ranks_that_nobody_ran_on_is_told_that_it_waited_for_them(
    frontend: Any, fakes: Any
) -> None:
    old = await frontend.create()
    frontend.cluster.gate.clear()
    old.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: frontend.cluster.starting)
    await asyncio.sleep(0.1)
    step = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"a")))
    stream = frontend.stub.TrainSteps()
    together = [frontend.train(each, request_id=fakes.request_id()) for each in (b"b", b"c")]
    await stream.write(pb.TrainStepsRequest(steps=together))
    query = pb.ComputeGradientsRequest(name="models/m")
    query.batch.CopyFrom(frontend.train(b"e").batch)
    look = asyncio.ensure_future(frontend.stub.ComputeGradients(query))
    await asyncio.sleep(0.3)
    frontend.cluster.gate.set()
    outcomes: list[Any] = []
    while len(outcomes) < 2:
        outcomes.extend((await stream.read()).outcomes)
    times = [each.result.timing for each in (await step, *outcomes)] + [(await look).timing]
    assert len(times) == 4
    for timing in times:
        assert 0.25 < timing.recovery < timing.total < 0.4 + timing.recovery
        assert timing.queue < 0.1
    await stream.done_writing()
    assert (await frontend.stub.TrainStep(frontend.train(b"d"))).result.timing.recovery == 0
