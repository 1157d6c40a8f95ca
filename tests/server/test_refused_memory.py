"""What is left in memory of requests that were refused: nothing, and no collector of cycles is needed for that."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from grpc.aio import EOF  # pyright: ignore[reportAttributeAccessIssue]
from server.test_wire import raw_call

from gradwire_proto import codec
from gradwire_proto.encoding.repeated_bytes import join_items
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, TensorData

SIZE, COUNT = 1 << 20, 9


@contextmanager
def little_is_left() -> Iterator[None]:
    """What is made inside is gone at its end, but for little, without the collector."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[0] < 3 * SIZE
    finally:
        tracemalloc.stop()
        gc.enable()


def large(frontend: Any, fakes: Any, way: str, by: str) -> bytes:
    """The bytes of a request with one large tensor, which `by` refuses."""
    request = frontend.train(request_id=fakes.request_id())
    request.batch.Clear()
    codec.encode_batch(Batch(TensorData("float32", (1, SIZE // 4), bytes(SIZE))), request.batch)
    if by == "codec":
        request.batch.inputs.tensor.shape[0] = 2
    elif by == "parser":
        request.batch.MergeFromString(b"\xfa\x3f\x01x")
    if way == "ForwardBackward":
        request = pb.ForwardBackwardRequest(name=request.name, request_id=request.request_id, batch=request.batch)
    return request.SerializeToString()


@pytest.mark.parametrize(
    ("way", "by"),
    [
        ("TrainStep", "ranks"),
        ("TrainStep", "codec"),
        ("TrainSteps", "ranks"),
        ("TrainSteps", "codec"),
        ("ForwardBackward", "codec"),
        ("ForwardBackward", "parser"),
    ],
)
async def test_refused_request_leaves_nothing(frontend: Any, fakes: Any, way: str, by: str) -> None:
    workers = await frontend.create()
    workers.refused = bytes(SIZE)
    # What this client holds of its requests was there before.
    raws = [large(frontend, fakes, way, by) for _ in range(COUNT)]
    stream = frontend.channel.stream_stream("/gradwire.v1.GradientService/TrainSteps")

    async def refuse(raw: bytes) -> None:
        if way == "TrainSteps":
            call = stream()
            await call.write(join_items([raw]))
            await call.done_writing()
            (outcome,) = pb.TrainStepsResponse.FromString(await call.read()).outcomes
            assert outcome.HasField("error") and await call.read() is EOF
        else:
            error = await frontend.error(raw_call(frontend, way, raw))
            assert type(error).__name__ == "InvalidArgument"

    await refuse(raws.pop())
    with little_is_left():
        for raw in raws:
            await refuse(raw)
        await asyncio.sleep(0.05)
