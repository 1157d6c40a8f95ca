"""A model waits until ranks are free where it is asked to, says for how many, and can be given up."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from gradwire_proto.errors import ModelNotFound, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1.model_pb2 import MODEL_STATE_READY, MODEL_STATE_WAITING
from gradwire_workers.pool.capacity import Capacity
from gradwire_workers.pool.capacity_queue import CapacityQueue


@pytest.fixture
async def full(start: Any) -> AsyncIterator[Any]:
    """A frontend whose two ranks are taken by the model "first"."""
    async with start() as frontend:
        frontend.cluster.capacity = Capacity(workers=2, gpus=0)
        frontend.cluster.queue = CapacityQueue(frontend.cluster.capacity)
        await frontend.create("first", workers=2)
        yield frontend


def creation(frontend: Any, seconds: float, model_id: str = "second", workers: int = 2) -> Any:
    request = frontend.creation(model_id, str(uuid.uuid4()), workers=workers)
    request.wait_for_capacity.FromNanoseconds(int(seconds * 1e9))
    return request


async def waiting(frontend: Any, model_id: str = "second") -> Any:
    """The model, once it waits."""
    await frontend.until(lambda: model_id in frontend.tenant._models._descriptions)
    await frontend.until(lambda: frontend.tenant._models._descriptions[model_id].waits)
    return await frontend.model(model_id)


async def delete(frontend: Any, model_id: str) -> None:
    await frontend.stub.DeleteModel(pb.DeleteModelRequest(name=f"models/{model_id}"))


async def test_a_model_that_waits_says_for_what_and_is_made_when_others_go(full: Any) -> None:
    call = asyncio.ensure_future(full.stub.CreateModel(creation(full, 60)))
    model = await waiting(full)
    assert (model.state, model.waits_for) == (MODEL_STATE_WAITING, "2 workers; 0 of the service's 2 are free")
    listed = {each.name: each.state for each in (await full.stub.ListModels(pb.ListModelsRequest())).models}
    assert listed == {"models/first": MODEL_STATE_READY, "models/second": MODEL_STATE_WAITING}
    error = await full.error(full.stub.TrainStep(full.train(model_id="second")))
    assert (error.reason, error.message) == ("MODEL_NOT_READY", f"models/second waits for {model.waits_for}")
    await delete(full, "first")
    assert ((await call).state, (await call).waits_for) == (MODEL_STATE_READY, "")


async def test_without_a_wait_a_full_service_says_so_at_once(full: Any) -> None:
    error = await full.error(full.stub.CreateModel(creation(full, 0)))
    assert isinstance(error, ResourceExhausted) and error.reason == "WORKERS_EXHAUSTED"


async def test_more_than_there_is_is_refused_at_once_with_both_numbers(full: Any) -> None:
    error = await asyncio.wait_for(full.error(full.stub.CreateModel(creation(full, 60, workers=3))), 2.0)
    assert error.message.startswith("asks for 3 workers; 0 of the service's 2") and not error.retryable


async def test_a_wait_ends_before_the_callers_deadline_with_the_numbers(full: Any) -> None:
    error = await full.error(full.stub.CreateModel(creation(full, 60), timeout=0.8))
    assert error.reason == "WORKERS_EXHAUSTED" and "it has waited as long as it was to" in error.message
    assert isinstance(await full.error(full.model("second")), ModelNotFound)


@pytest.mark.parametrize("how", ["caller", "deletion"])
async def test_a_model_that_is_given_up_leaves_nothing_and_lets_others_go_on(full: Any, how: str) -> None:
    call = full.stub.CreateModel(creation(full, 60))
    await waiting(full)
    behind = asyncio.ensure_future(full.stub.CreateModel(creation(full, 60, "third", workers=1)))
    await waiting(full, "third")
    if how == "caller":
        call.cancel()
    else:
        await delete(full, "second")
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await call
    await full.until(lambda: "second" not in full.tenant._models._descriptions)
    assert isinstance(await full.error(full.model("second")), ModelNotFound)
    await delete(full, "first")
    assert (await behind).state == MODEL_STATE_READY
    await delete(full, "third")
    assert full.cluster.capacity.free_workers == 2
    await full.create("second", workers=2)


async def test_a_service_that_drains_sends_those_who_wait_to_the_next(full: Any) -> None:
    call = asyncio.ensure_future(full.error(full.stub.CreateModel(creation(full, 60))))
    await waiting(full)
    await asyncio.wait_for(full.service.drain(), 5)
    error = await call
    assert (error.reason, error.retryable, error.outcome) == ("DRAINING", True, "not_applied") and error.retry_after


async def test_a_wait_that_is_no_time_is_refused(full: Any) -> None:
    for seconds in (-1, 8 * 86_400):
        error = await full.error(full.stub.CreateModel(creation(full, seconds)))
        assert error.field == "wait_for_capacity"


async def test_a_restored_model_waits_too(full: Any) -> None:
    await full.stub.CreateCheckpoint(pb.CreateCheckpointRequest(parent="models/first", checkpoint_id="saved"))
    request = pb.RestoreModelRequest(checkpoint="checkpoints/saved", model_id="second")
    assert (await full.error(full.stub.RestoreModel(request))).reason == "WORKERS_EXHAUSTED"
    request.wait_for_capacity.seconds = 60
    call = asyncio.ensure_future(full.stub.RestoreModel(request))
    assert (await waiting(full)).waits_for == "2 workers; 0 of the service's 2 are free"
    await delete(full, "first")
    assert (await call).state == MODEL_STATE_READY
