"""Ranks that are lost: commands run again on others, once."""

from __future__ import annotations

from typing import Any

from server.brought_back import get_command, ready, steps

from gradwire_proto import codec
from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Retention


async def test_command_that_meets_a_lost_rank_runs_again_on_new_ranks_and_takes_longer(
    frontend: Any, fakes: Any
) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.error = RankLost("rank 1 died", outcome="unknown")
    reply = await frontend.stub.TrainStep(frontend.train(b"b"))
    new = frontend.cluster.groups["m"]
    assert new is not old and old.closed == [False] and old.salvaged == [1]
    assert old.vacated and frontend.cluster.places == [None, old], "nobody else could have had its place"
    assert steps(new) == [(b"a", 1), (b"b", 2)] and reply.result.step == 2
    assert reply.result.timing.recovery > 0
    assert (await frontend.stub.TrainStep(frontend.train(b"c"))).result.timing.recovery == 0
    model = await frontend.model()
    assert model.state == model_pb2.MODEL_STATE_READY and "rank 1 died" in model.last_error.message


async def test_state_of_a_rank_that_is_left_is_taken_before_the_journal(frontend: Any, fakes: Any) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.kept = old.now()
    old.error = RankLost("rank 1 died", outcome="unknown")
    assert (await frontend.stub.TrainStep(frontend.train(b"b"))).result.step == 2
    assert steps(frontend.cluster.groups["m"]) == [(b"b", 2)]


async def test_ranks_that_are_lost_while_nothing_runs_are_replaced_at_once(frontend: Any) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
    assert steps(await ready(frontend)) == [(b"a", 1)]


async def test_command_that_loses_its_ranks_twice_is_refused_for_good_and_the_model_goes_on(
    start: Any, fakes: Any
) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        frontend.cluster.deadly = b"x"
        request = frontend.train(b"x", request_id=fakes.request_id())
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert (error.reason, error.outcome) == ("COMMAND_KILLS_RANKS", "not_applied")
        await frontend.stub.TrainStep(frontend.train(b"b"))
        started = len(frontend.cluster.started)
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"
        assert len(frontend.cluster.started) == started == 3
    async with start() as frontend:
        workers = await ready(frontend)
        assert steps(workers) == [(b"a", 1), (b"b", 2)], "random numbers are those of a run without it"
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"
        command = await frontend.stub.GetCommand(get_command(request.request_id))
        assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED
        assert (await frontend.stub.TrainStep(frontend.train(b"c"))).result.step == 3
        assert steps(workers)[-1] == (b"c", 3)


async def test_command_of_which_nobody_knows_what_it_left_behind_is_undone(frontend: Any, fakes: Any) -> None:
    old = await frontend.create()
    old.kept = old.now()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.error = RuntimeError("a defect")
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"b")))
    assert error.outcome == "not_applied" and not old.salvaged
    assert (await frontend.stub.TrainStep(frontend.train(b"c"))).result.step == 2
    assert steps(frontend.cluster.groups["m"]) == [(b"a", 1), (b"c", 2)]


async def test_backward_of_a_forward_that_lost_ranks_had_retained_works(frontend: Any, fakes: Any) -> None:
    old = await frontend.create()
    request = pb.ForwardRequest(name="models/m")
    codec.encode_value(fakes.two_floats(), request.inputs)
    codec.encode_retention(Retention(), request.retain)
    name = (await frontend.stub.Forward(request)).retained
    old.on_lost(RankLost("rank 0 died"))
    back = pb.BackwardRequest(name="models/m", retained=name)
    codec.encode_cotangents([fakes.two_floats()], back)
    await frontend.stub.Backward(back)
    assert [call[0] for call in frontend.cluster.groups["m"].calls] == ["retained_forward", "backward"]
