"""Steps that all ranks are handed at once: what counts, and what becomes of a group whose ranks come apart."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from gradwire_proto.errors import InternalError, InvalidArgument, RankLost
from gradwire_workers import ranks as ranks_module
from gradwire_workers.rank_channel import Answer
from gradwire_workers.ranks import Ranks
from gradwire_workers.step_dispatch import StepDispatch
from gradwire_workers.step_rows import StepRow


class Rank:
    """A rank that answers what a test says."""

    def __init__(self) -> None:
        self.channel: Any = SimpleNamespace(on_lost=None, lost=None)
        self.kinds: list[str] = []
        self.answers: deque[asyncio.Future[Answer]] = deque()

    def call(self, kind: str, fields: Any = None, take: Any = None) -> asyncio.Future[Answer]:
        self.kinds.append(kind)
        self.take = take
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        if take is None:
            self.end()
        return answer

    def applies(self, *steps: int) -> None:
        self.take([StepRow(0.5, step, 0.1, None, False, None, 1e-3, 0.0, 1e-4, 2e-3) for step in steps])

    def end(self, error: Any = None, *, needs_rejoin: bool = False) -> None:
        self.answers.popleft().set_result(Answer(fields={}, error=error, needs_rejoin=needs_rejoin, busy=0.0))

    def dies(self) -> None:
        self.channel.lost = RankLost("died", outcome="unknown")
        while self.answers:
            self.answers.popleft().set_exception(self.channel.lost)
        self.channel.on_lost(self.channel.lost)

    def kill(self) -> None:
        self.kinds.append("kill")


@pytest.fixture
def two() -> tuple[Any, Any]:
    return Rank(), Rank()


@pytest.fixture
def ranks(two: Any) -> Ranks:
    return Ranks(two)


class Run:
    """A dispatch under way; `steps` are those that counted, and how many ranks told of each."""

    def __init__(self, ranks: Ranks) -> None:
        self.steps: list[tuple[int, int]] = []
        self.dispatch = StepDispatch(ranks, self._took)
        self.dispatch.send([{}, {}], 4)
        self.task = asyncio.ensure_future(self.dispatch.ended())

    def _took(self, steps: Any, idle: float) -> None:
        self.steps.extend((of_ranks[0].step, len(of_ranks)) for of_ranks in steps)

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_step_counts_when_every_rank_has_applied_it(two, ranks):
    run = Run(ranks)
    await run.settle()
    two[0].applies(1, 2)
    two[1].applies(1)
    await run.settle()
    assert run.steps == [(1, 2)] and ranks.applied == 1
    two[1].applies(2, 3)
    two[0].applies(3)
    two[0].end()
    two[1].end()
    await run.task
    assert run.steps == [(1, 2), (2, 2), (3, 2)] and ranks.applied == 3 and ranks.lost is None


async def test_the_error_that_all_ranks_end_with_is_raised_and_the_ranks_go_on(two, ranks):
    run = Run(ranks)
    await run.settle()
    for rank in two:
        rank.applies(1)
    two[0].end(InternalError("another rank failed", reason="PEER_FAILED"), needs_rejoin=True)
    two[1].end(InvalidArgument("no", field="batch.targets", reason="TARGET_OUT_OF_RANGE"), needs_rejoin=True)
    with pytest.raises(InvalidArgument):
        await run.task
    assert run.steps == [(1, 2)] and ranks.applied == 1 and ranks.lost is None
    assert two[0].kinds == two[1].kinds == ["train_steps", "rejoin"]


async def test_ranks_that_got_unequally_far_are_lost(two, ranks):
    run = Run(ranks)
    await run.settle()
    two[0].applies(1, 2)
    two[1].applies(1)
    two[0].end(InternalError("another rank failed", reason="PEER_FAILED"))
    two[1].end(InvalidArgument("no", reason="NO"))
    with pytest.raises(RankLost):
        await run.task
    assert run.steps == [(1, 2)] and ranks.applied == 1 and ranks.lost is not None


async def test_a_rank_that_is_slow_to_notice_that_another_has_failed_is_waited_for(two, ranks, monkeypatch):
    run = Run(ranks)
    await run.settle()
    for rank in two:
        rank.applies(1)
    two[0].end(InvalidArgument("no", reason="NO"), needs_rejoin=True)
    await run.settle()
    # An hour later it is still at work on the step.
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: time.monotonic() + 3600)
    await run.settle()
    assert not run.task.done()
    two[1].end(InternalError("another rank failed", reason="PEER_FAILED"), needs_rejoin=True)
    with pytest.raises(InvalidArgument):
        await run.task
    assert run.steps == [(1, 2)] and ranks.lost is None and two[1].kinds == ["train_steps", "rejoin"]


async def test_a_message_is_sent_behind_one_that_is_half_done_and_no_third_before_it_is_that_itself(two, ranks):
    run = Run(ranks)
    for rank in two:
        rank.applies(1)
    assert run.dispatch.is_under_way and not run.dispatch.has_room
    for rank in two:
        rank.applies(2)
    assert run.dispatch.has_room
    run.dispatch.send([{}, {}], 2)
    for rank in two:
        rank.applies(3, 4)
        rank.end()
    assert not run.dispatch.has_room and run.dispatch.unanswered == 2
    for rank in two:
        rank.applies(5)
    assert run.dispatch.has_room
    for rank in two:
        rank.applies(6)
        rank.end()
    await run.task
    assert [step for step, _ in run.steps] == [1, 2, 3, 4, 5, 6] and ranks.applied == 6 and ranks.lost is None


async def test_what_follows_on_steps_of_which_one_failed_is_refused_and_the_ranks_go_on(two, ranks):
    run = Run(ranks)
    for rank in two:
        rank.applies(1, 2)
    run.dispatch.send([{}, {}], 2)
    behind = InternalError("a step before these failed", reason="STEP_BEFORE_FAILED", outcome="not_applied")
    for rank in two:
        rank.end(InvalidArgument("no", reason="NO"))
    await run.settle()
    assert not run.task.done() and not run.dispatch.has_room
    for rank in two:
        rank.end(behind)
    with pytest.raises(InvalidArgument):
        await run.task
    assert [step for step, _ in run.steps] == [1, 2] and ranks.applied == 2 and ranks.lost is None


async def test_ranks_that_carry_out_what_follows_on_a_failure_are_lost(two, ranks):
    run = Run(ranks)
    for rank in two:
        rank.applies(1, 2)
    run.dispatch.send([{}, {}], 2)
    for rank in two:
        rank.end(InvalidArgument("no", reason="NO"))
        rank.end()
    with pytest.raises(RankLost):
        await run.task
    assert ranks.lost is not None


async def test_a_defect_in_what_is_done_about_results_loses_the_ranks_and_is_raised(two, ranks):
    run = Run(ranks)
    run.steps = None  # pyright: ignore[reportAttributeAccessIssue]
    for rank in two:
        rank.applies(1)
    with pytest.raises(AttributeError):
        await run.task
    assert ranks.lost is not None


async def test_what_one_rank_has_told_counts_once_another_is_lost(two, ranks):
    run = Run(ranks)
    await run.settle()
    two[0].applies(1, 2)
    two[1].applies(1, 2, 3)
    two[0].dies()
    await run.settle()
    assert two[0].kinds[-1] == "kill" and not run.task.done()
    two[1].applies(4)
    two[1].end(InternalError("another rank failed", reason="PEER_FAILED"))
    with pytest.raises(RankLost, match="died"):
        await run.task
    assert run.steps == [(1, 2), (2, 2), (3, 1), (4, 1)] and ranks.applied == 4


async def test_steps_that_one_rank_has_carried_out_are_applied_though_another_is_lost_before_it_tells(two, ranks):
    run = Run(ranks)
    await run.settle()
    two[1].dies()
    two[0].applies(1, 2)
    two[0].end()
    await run.task
    assert run.steps == [(1, 1), (2, 1)] and ranks.applied == 2 and ranks.lost is not None


async def test_a_rank_that_does_not_end_once_another_is_lost_is_not_waited_for(two, ranks, monkeypatch):
    monkeypatch.setattr(ranks_module, "_SECONDS_TO_FINISH", 0.1)
    run = Run(ranks)
    await run.settle()
    two[0].applies(1)
    two[1].dies()
    with pytest.raises(RankLost, match="died"):
        await asyncio.wait_for(run.task, 5)
    assert run.steps == [(1, 1)] and ranks.applied == 1


async def test_a_dispatch_that_is_given_up_loses_the_ranks(two, ranks):
    run = Run(ranks)
    await run.settle()
    run.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run.task
    assert ranks.lost is not None
    with pytest.raises(RankLost):
        StepDispatch(ranks, lambda rows, idle: None).send([{}, {}], 1)
