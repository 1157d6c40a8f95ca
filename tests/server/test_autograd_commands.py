"""Retained forwards at the frontend: how many, for how long, and who may go back through them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import BackwardQuery, Retention


def forward(fakes: Any, **retention: Any) -> pb.ForwardRequest:
    request = pb.ForwardRequest(name="models/m")
    codec.encode_value(fakes.two_floats(), request.inputs)
    codec.encode_retention(Retention(**retention), request.retain)
    return request


def backward(fakes: Any, retained: str, **query: Any) -> pb.BackwardRequest:
    request = pb.BackwardRequest(name="models/m")
    codec.encode_backward_query(BackwardQuery(retained=retained, **query), request)
    codec.encode_cotangents([fakes.two_floats()], request)
    return request


async def test_a_forward_is_gone_back_through_once_unless_it_is_kept(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    reply = await frontend.stub.Forward(forward(fakes))
    assert list(reply.differentiable_outputs) == [0]
    await frontend.stub.Backward(backward(fakes, reply.retained, keep=True))
    found = await frontend.stub.Backward(backward(fakes, reply.retained, input_gradients=True))
    gradients = codec.decode_backward_result(found).input_gradients
    assert gradients is not None and gradients[1] is None and fakes.read(gradients[0]) == fakes.two_floats().data
    error = await frontend.error(frontend.stub.Backward(backward(fakes, reply.retained)))
    assert error.reason == "RETAINED_GONE"


async def test_a_repeated_backward_adds_once(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    reply = await frontend.stub.Forward(forward(fakes))
    request = backward(fakes, reply.retained)
    request.request_id = fakes.request_id()
    first = await frontend.stub.Backward(request)
    assert await frontend.stub.Backward(request) == first
    assert [call[0] for call in workers.calls] == ["retained_forward", "backward"]


async def test_a_forward_that_is_not_used_in_time_is_released_on_the_ranks(start: Any, fakes: Any) -> None:
    async with start(retained_seconds=0.1) as frontend:
        workers = await frontend.create()
        reply = await frontend.stub.Forward(forward(fakes))
        await frontend.until(lambda: not workers.retained.kept)
        error = await frontend.error(frontend.stub.Backward(backward(fakes, reply.retained)))
        assert error.reason == "RETAINED_GONE" and "retained_seconds" in error.message


async def test_each_use_of_a_forward_gives_it_its_whole_time_again(start: Any, fakes: Any) -> None:
    async with start(retained_seconds=0.4) as frontend:
        workers = await frontend.create()
        reply = await frontend.stub.Forward(forward(fakes))
        for _ in range(4):
            await asyncio.sleep(0.2)
            await frontend.stub.Backward(backward(fakes, reply.retained, keep=True))
        assert workers.retained.kept == [reply.retained]


async def test_the_number_of_retained_forwards_is_bounded_and_released_ones_make_room(start: Any, fakes: Any) -> None:
    async with start(retained_forwards=2) as frontend:
        workers = await frontend.create()
        first, second = [(await frontend.stub.Forward(forward(fakes))).retained for _ in range(2)]
        error = await frontend.error(frontend.stub.Forward(forward(fakes)))
        assert error.reason == "RETAINED_FORWARDS" and "retained_forwards" in error.message
        await frontend.stub.Release(pb.ReleaseRequest(name="models/m", retained=[first, "0" * 32]))
        third = (await frontend.stub.Forward(forward(fakes))).retained
        assert workers.retained.kept == [second, third]
        await frontend.stub.Forward(forward(fakes, release=(second,)))


async def test_after_the_ranks_are_lost_a_backward_says_that_the_model_has_failed(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create(durability="none")
    reply = await frontend.stub.Forward(forward(fakes))
    workers.on_lost(RankLost("a rank died", outcome="unknown"))
    await frontend.until(lambda: workers.closed)
    error = await frontend.error(frontend.stub.Backward(backward(fakes, reply.retained)))
    assert type(error).__name__ == "FailedPrecondition" and error.reason == "MODEL_FAILED"


async def test_gradients_are_read_and_set(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    reply = await frontend.stub.GetGradients(pb.GetGradientsRequest(name="models/m", wrt=["w"]))
    assert codec.decode_named_tensors(reply.gradients) == {"w": fakes.two_floats()}
    request = pb.SetGradientsRequest(name="models/m", dropped=["b"])
    codec.encode_named_tensors({"w": fakes.two_floats()}, request.gradients)
    await frontend.stub.SetGradients(request)
    assert workers.calls[-1] == ("set_gradients", {"w": fakes.two_floats().data}, ("b",))


async def test_options_of_groups_reach_the_ranks(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = pb.OptimizerStepRequest(name="models/m")
    codec.encode_group_options([{"lr": 0.5, "betas": (0.9, 0.99)}, {}], request)
    await frontend.stub.OptimizerStep(request)
    assert workers.calls[-1][-1] == ({"lr": 0.5, "betas": (0.9, 0.99)}, {})


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (lambda request: setattr(request, "retained", "../x"), "retained", "RETAINED_INVALID"),
        (lambda request: request.ClearField("cotangents"), "cotangents", "FIELD_MISSING"),
        (lambda request: setattr(request.cotangents, "integer", 1), "cotangents", "COTANGENT_MISMATCH"),
        (lambda request: request.cotangents.list.ClearField("items"), "cotangents", "COTANGENT_MISMATCH"),
        (
            lambda request: setattr(request.cotangents.list.items[0], "integer", 1),
            "cotangents[0]",
            "COTANGENT_MISMATCH",
        ),
        (
            lambda request: (request.wrt.append("w"), setattr(request, "no_parameter_gradients", True)),
            "wrt",
            "WRT_CONTRADICTION",
        ),
        (lambda request: request.wrt.append(""), "wrt[0]", "NAME_MISSING"),
        (lambda request: setattr(request, "max_inline_bytes", -1), "max_inline_bytes", "INTEGER_OUT_OF_RANGE"),
    ],
)
async def test_a_backward_that_makes_no_sense_is_refused_by_field(
    frontend: Any, fakes: Any, change: Any, field: str, reason: str
) -> None:
    await frontend.create()
    request = backward(fakes, "0" * 32)
    change(request)
    error = await frontend.error(frontend.stub.Backward(request))
    assert (error.field, error.reason) == (field, reason)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda retain: retain.inputs.extend([0, 0]), "retain.inputs"),
        (lambda retain: retain.inputs.append(-1), "retain.inputs[0]"),
        (lambda retain: retain.release.append("x"), "retain.release[0]"),
    ],
)
async def test_a_retention_that_makes_no_sense_is_refused_by_field(
    frontend: Any, fakes: Any, change: Any, field: str
) -> None:
    await frontend.create()
    request = forward(fakes)
    change(request.retain)
    assert (await frontend.error(frontend.stub.Forward(request))).field == field


async def test_a_forward_that_is_refused_has_the_ranks_release_what_it_named_all_the_same(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    from gradwire_proto.errors import InvalidArgument

    async def refused(*_: Any, **__: Any) -> None:
        raise InvalidArgument("no rows", field="inputs", reason="ROWS_MISSING")

    workers = await frontend.create()
    reply = await frontend.stub.Forward(forward(fakes))
    monkeypatch.setattr(workers.retained, "forward", refused)
    error = await frontend.error(frontend.stub.Forward(forward(fakes, release=(reply.retained,))))
    assert error.reason == "ROWS_MISSING"
    await frontend.until(lambda: not workers.retained.kept)


async def test_a_backward_through_a_forward_before_an_update_says_that_settings_were_changed(
    frontend: Any, fakes: Any
) -> None:
    await frontend.create()
    reply = await frontend.stub.Forward(forward(fakes))
    await frontend.stub.UpdateModel(pb.UpdateModelRequest(name="models/m", labels={"labels": {"a": "b"}}))
    await frontend.stub.Backward(backward(fakes, reply.retained, keep=True))
    await frontend.stub.UpdateModel(pb.UpdateModelRequest(name="models/m", learning_rate=0.5))
    error = await frontend.error(frontend.stub.Backward(backward(fakes, reply.retained)))
    assert error.reason == "RETAINED_GONE" and "Model.update" in error.message
