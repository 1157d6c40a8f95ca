"""Commands of a journal that are applied once more: what they answered, and what room there is for it, is no matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import ForwardResult, TensorData


def forward(fakes: Any, **fields: Any) -> Any:
    """A request for a forward that is a command."""
    request = pb.ForwardRequest(name="models/m", training=True, request_id=fakes.request_id(), **fields)
    codec.encode_value(fakes.two_floats(), request.inputs)
    return request


async def comes_back(frontend: Any) -> bool:
    """Whether the model is served once it has been brought back, or does not come back."""
    hosted = frontend.tenant._models._hosted["m"]
    await frontend.until(lambda: hosted.description.info.state != "recovering")
    return (await frontend.model()).state == model_pb2.MODEL_STATE_READY


async def test_command_whose_reply_was_too_large_does_not_keep_its_model_from_coming_back(
    start: Callable[..., Any], fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ForwardResult(outputs=TensorData("uint8", (1 << 16,), b"x" * (1 << 16)), step=0)

    async def answers_much(*_: Any, **__: Any) -> ForwardResult:
        return large

    monkeypatch.setattr(fakes.FakeWorkers, "forward", answers_much)
    request = forward(fakes)
    async with start(message_bytes=1 << 16) as frontend:
        await frontend.create()
        error = await frontend.error(frontend.stub.Forward(request))
        assert (error.reason, error.outcome) == ("REPLY_TOO_LARGE", "applied")
    async with start(message_bytes=1 << 16) as frontend:
        assert await comes_back(frontend)
        error = await frontend.error(frontend.stub.Forward(request))
        assert (error.reason, error.outcome) == ("REPLY_FORGOTTEN", "applied")


async def test_answers_made_anew_that_find_no_room_do_not_keep_a_model_from_coming_back(
    start: Callable[..., Any], fakes: Any
) -> None:
    requests = [forward(fakes, max_inline_bytes=1) for _ in range(6)]
    async with start(held_bytes=32) as frontend:
        await frontend.create()
        for request in requests:
            outputs = codec.decode_forward_result(await frontend.stub.Forward(request)).outputs
            await frontend.download(outputs.data.name.partition("/tensors/")[0])
    async with start(held_bytes=32) as frontend:
        assert await comes_back(frontend)
        assert len(frontend.cluster.started) == 1
        outputs = codec.decode_forward_result(await frontend.stub.Forward(requests[0])).outputs
        assert await frontend.download(outputs.data.name.partition("/tensors/")[0]) == fakes.two_floats().data
        error = await frontend.error(frontend.stub.Forward(requests[-1]))
        assert (error.reason, error.outcome) == ("REPLY_FORGOTTEN", "applied")


async def test_answers_are_not_made_anew_where_they_are_known(start: Callable[..., Any], fakes: Any) -> None:
    request = forward(fakes, max_inline_bytes=1)
    async with start() as frontend:
        old = await frontend.create()
        first = await frontend.stub.Forward(request)
        files = frontend.files
        old.on_lost(RankLost("rank 0 died"))
        await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
        assert await comes_back(frontend)
        assert [call[0] for call in frontend.cluster.groups["m"].calls] == ["forward"]
        assert frontend.files == files
        assert await frontend.stub.Forward(request) == first


async def test_ranks_apply_a_journal_whatever_the_limits_are_now_and_heed_them_afterwards(
    start: Callable[..., Any], fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, limited = fakes.FakeWorkers.train_step, []

    async def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        limited.append(self.limited)
        return await train_step(self, *arguments, **named)

    monkeypatch.setattr(fakes.FakeWorkers, "train_step", noted)
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
    async with start() as frontend:
        assert await comes_back(frontend)
        await frontend.stub.TrainStep(frontend.train(b"b"))
    assert limited == [True, False, True]
