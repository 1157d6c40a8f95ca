"""UpdateModel: settings change once, in order, whole or not at all, and the model's description follows."""

from __future__ import annotations

import asyncio
from typing import Any

from gradwire_proto import codec
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2


async def test_update_runs_in_its_turn_and_a_repeat_gets_the_first_reply(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    request = pb.UpdateModelRequest(
        name="models/m", request_id=fakes.request_id(), trainable=[{"pattern": "w", "trainable": True}]
    )
    calls = [frontend.stub.TrainStep(frontend.train()), frontend.stub.UpdateModel(request)]
    pending = [asyncio.ensure_future(call) for call in calls]
    await frontend.until(lambda: workers.busy)
    workers.gate.set()
    _, first = await asyncio.gather(*pending)
    await frontend.stub.UpdateModel(pb.UpdateModelRequest(name="models/m", labels={"labels": {"a": "b"}}))
    assert await frontend.stub.UpdateModel(request) == first
    assert [call[0] for call in workers.calls] == ["train_step", "update"]
    assert (first.step, first.tensors[0].requires_grad) == (1, True)


async def test_replies_of_updates_are_forgotten_when_they_are_too_many_together(start: Any, fakes: Any) -> None:
    async with start(message_bytes=1 << 16) as frontend:
        await frontend.create(labels={str(each): "x" * 63 for each in range(64)})
        requests = [
            pb.UpdateModelRequest(name="models/m", request_id=fakes.request_id(), learning_rate=0.5) for _ in range(40)
        ]
        replies = [await frontend.stub.UpdateModel(request) for request in requests]
        assert sum(reply.ByteSize() for reply in replies) > 1 << 16
        assert (await frontend.error(frontend.stub.UpdateModel(requests[0]))).reason == "REPLY_FORGOTTEN"
        assert await frontend.stub.UpdateModel(requests[-1]) == replies[-1]


async def test_labels_are_replaced_whole_without_asking_a_rank_and_nothing_else_changes(frontend: Any) -> None:
    workers = await frontend.create(labels={"team": "vision", "stage": "new"})
    before = await frontend.stub.GetModel(pb.GetModelRequest(name="models/m"))
    for labels in ({"team": "audio"}, {}):
        request = pb.UpdateModelRequest(name="models/m")
        request.labels.SetInParent()
        request.labels.labels.update(labels)
        reply = await frontend.stub.UpdateModel(request)
        assert dict(reply.labels) == labels
    assert workers.calls == []
    before.labels.clear()
    assert reply == before == await frontend.stub.GetModel(pb.GetModelRequest(name="models/m"))


async def test_description_tells_the_learning_rate_the_optimizer_and_what_is_frozen(frontend: Any) -> None:
    workers = await frontend.create()
    optimizer = model_pb2.Optimizer(name="Adam", groups=[{"pattern": "a"}, {"pattern": "b"}])
    codec.encode_options({"lr": 0.5}, optimizer.options)
    codec.encode_options({"lr": 0.25}, optimizer.groups[0].options)
    request = pb.UpdateModelRequest(
        name="models/m", optimizer=optimizer, learning_rate=0.125, trainable=[{"pattern": "w", "trainable": False}]
    )
    info = codec.decode_model_info(await frontend.stub.UpdateModel(request))
    assert workers.calls[0][1].lr == 0.125
    assert info.optimizer is not None
    assert (info.optimizer.name, info.optimizer.options) == ("Adam", {"lr": 0.125})
    assert [group.options for group in info.optimizer.groups] == [{"lr": 0.125}, {}]
    assert not info.tensors[0].requires_grad


async def test_update_that_the_ranks_refuse_changes_nothing(frontend: Any) -> None:
    workers = await frontend.create(labels={"team": "vision"})
    workers.error = InvalidArgument("no such name", field='trainable["x"]', reason="NO_MATCH")
    before = await frontend.stub.GetModel(pb.GetModelRequest(name="models/m"))
    request = pb.UpdateModelRequest(
        name="models/m", trainable=[{"pattern": "x"}], learning_rate=0.5, labels={"labels": {"team": "audio"}}
    )
    error = await frontend.error(frontend.stub.UpdateModel(request))
    assert (error.reason, error.field, error.outcome) == ("NO_MATCH", 'trainable["x"]', "not_applied")
    after = await frontend.stub.GetModel(pb.GetModelRequest(name="models/m"))
    after.ClearField("last_error")
    assert after == before
