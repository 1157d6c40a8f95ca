"""What of a model outlives its frontend: uploads, settings, retained forwards, replies, checkpoints."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from server.brought_back import ready, steps

from gradwire_proto import codec
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Batch, Retention, TensorData, Value
from gradwire_server.model_storage import ModelStorage
from gradwire_server.storage.blobs import Blobs


async def test_uploads_are_kept_for_as_long_as_a_record_names_them(start: Any, fakes: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        name = await frontend.upload(TensorData("float32", (1, 2), b"uploaded"))
        request = frontend.train()
        request.batch.inputs.tensor.handle = f"{name}/tensors/0"
        await frontend.stub.TrainStep(request)
        assert len(list((storage / "models/m/blobs").iterdir())) == 1
    async with start() as frontend:
        assert steps(await ready(frontend)) == [(b"uploaded", 1)]


async def test_upload_of_a_refused_command_is_not_kept(frontend: Any, storage: Path) -> None:
    workers = await frontend.create()
    workers.error = InvalidArgument("no")
    name = await frontend.upload(TensorData("float32", (1, 2), b"uploaded"))
    request = frontend.train()
    request.batch.inputs.tensor.handle = f"{name}/tensors/0"
    await frontend.error(frontend.stub.TrainStep(request))
    assert not list((storage / "models/m/blobs").iterdir())


async def test_upload_is_not_kept_where_another_of_its_command_has_no_room(
    frontend: Any, storage: Path, monkeypatch: Any
) -> None:
    workers, keep, kept = await frontend.create(), Blobs.keep, []

    def full(self: Blobs, source: Path, name: str) -> str:
        if kept:
            raise ResourceExhausted("no space is left", reason="STORAGE_FULL")
        kept.append(keep(self, source, name))
        return kept[0]

    request = pb.TrainStepRequest(name="models/m")
    inputs: list[Value] = [TensorData("float32", (1, 2), bytes(8)) for _ in range(2)]
    codec.encode_batch(Batch(inputs), request.batch)
    for each in request.batch.inputs.list.items:
        name = await frontend.upload(TensorData("float32", (1, 2), b"uploaded"))
        each.tensor.handle = f"{name}/tensors/0"
    monkeypatch.setattr(Blobs, "keep", full)
    assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "STORAGE_FULL"
    assert kept and not list((storage / "models/m/blobs").iterdir()) and not steps(workers)


async def test_settings_and_variants_come_back(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        update = pb.UpdateModelRequest(name="models/m", learning_rate=0.5, labels={"labels": {"a": "b"}})
        await frontend.stub.UpdateModel(update)
        request = pb.AddVariantRequest(name="models/m", request_id=fakes.request_id())
        codec.encode_variant(fakes.variant("more"), request.variant)
        first = await frontend.stub.AddVariant(request)
        before = await frontend.model()
    async with start() as frontend:
        workers = await ready(frontend)
        assert [call[0] for call in workers.calls] == ["update", "add_variant"]
        assert await frontend.model() == before
        assert await frontend.stub.AddVariant(request) == first


async def test_retained_forwards_are_there_again_under_their_names_and_released_ones_are_not(
    start: Any, fakes: Any
) -> None:
    def forward() -> pb.ForwardRequest:
        request = pb.ForwardRequest(name="models/m")
        codec.encode_value(fakes.two_floats(), request.inputs)
        codec.encode_retention(Retention(), request.retain)
        return request

    async with start(retained_forwards=2) as frontend:
        await frontend.create()
        for _ in range(3):
            gone = (await frontend.stub.Forward(forward())).retained
            await frontend.stub.Release(pb.ReleaseRequest(name="models/m", retained=[gone]))
        kept = (await frontend.stub.Forward(forward())).retained
    async with start(retained_forwards=2) as frontend:
        assert (await ready(frontend)).retained.kept == [kept]


async def test_reply_that_was_too_large_to_be_stored_is_made_anew(start: Any, fakes: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("gradwire_server.stored_replies.REPLY_BYTES", 10)
    request = pb.ForwardRequest(name="models/m", training=True, request_id=fakes.request_id())
    codec.encode_value(fakes.two_floats(), request.inputs)
    async with start() as frontend:
        await frontend.create()
        first = await frontend.stub.Forward(request)
        assert await frontend.stub.Forward(request) == first
    async with start() as frontend:
        again = await frontend.stub.Forward(request)
        assert again.outputs == first.outputs and again.step == first.step
        assert [call[0] for call in frontend.cluster.groups["m"].calls] == ["forward"]


async def test_model_that_is_brought_back_tells_what_it_waits_for_and_can_be_deleted(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.create("other")
    async with start(held=True) as frontend:
        frontend.cluster.error = ResourceExhausted("no free ranks", reason="WORKERS_EXHAUSTED")
        frontend.cluster.gate.set()
        await frontend.until(lambda: frontend.cluster.tries > 2)
        model = await frontend.model()
        assert model.state == model_pb2.MODEL_STATE_RECOVERING and "no free ranks" in model.last_error.message
        waiting = asyncio.ensure_future(frontend.error(frontend.stub.TrainStep(frontend.train())))
        await asyncio.sleep(0.05)
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
        assert (await waiting).reason == "MODEL_DELETED"
        frontend.cluster.error = None
        await ready(frontend, "other")
        assert [path.name for path in (storage / "models").iterdir()] == ["other"]


async def test_creation_that_is_given_up_while_it_is_saved_leaves_nothing(
    start: Any, storage: Path, monkeypatch: Any
) -> None:
    made, make = threading.Event(), ModelStorage.make

    def slowly(self: Any, *arguments: Any) -> None:
        made.set()
        time.sleep(0.2)
        make(self, *arguments)

    monkeypatch.setattr(ModelStorage, "make", slowly)
    async with start() as frontend:
        call = frontend.stub.CreateModel(frontend.creation())
        await frontend.until(made.is_set)
        call.cancel()
        await frontend.until(lambda: frontend.cluster.groups["m"].closed)
        assert not list((storage / "models").iterdir()) and not list(storage.glob("checkpoints/auto/*/*/*"))
        await frontend.create()


async def test_model_that_outlives_nothing_is_gone_after_a_restart(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create(durability="none")
        await frontend.stub.TrainStep(frontend.train())
        assert not list((storage / "models").iterdir())
    async with start() as frontend:
        assert not (await frontend.stub.ListModels(pb.ListModelsRequest())).models


async def test_checkpoint_is_taken_although_the_queue_is_full(start: Any, storage: Path, caplog: Any) -> None:
    async with start(requests_per_model=2, checkpoint_commands=1) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        calls = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(2)]
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.05)
        workers.gate.set()
        await asyncio.gather(*calls)
        await frontend.until(lambda: len(list(storage.glob("checkpoints/auto/*/m/*"))) > 1)
    assert "no checkpoint could be taken" not in caplog.text


async def test_checkpoints_shorten_what_is_applied_again_and_replies_are_kept(start: Any, fakes: Any) -> None:
    async with start(checkpoint_commands=4) as frontend:
        workers = await frontend.create()
        request = frontend.train(b"a", request_id=fakes.request_id())
        first = await frontend.stub.TrainStep(request)
        for _ in range(3):
            await frontend.stub.TrainStep(frontend.train())
        listed = pb.ListCheckpointsRequest()
        async with asyncio.timeout(5):
            while len((await frontend.stub.ListCheckpoints(listed)).checkpoints) < 2:
                await asyncio.sleep(0.01)
        await frontend.stub.TrainStep(frontend.train(b"z"))
    async with start() as frontend:
        workers = await ready(frontend)
        assert steps(workers) == [(b"z", 5)] and workers.step == 5
        assert await frontend.stub.TrainStep(request) == first


async def test_a_variant_that_comes_back_is_split_as_it_was_found_to_be_when_it_was_added(
    start: Any, fakes: Any
) -> None:
    async with start() as frontend:
        workers = await frontend.create()
        frontend.cluster.tried = "it took too long to find out"
        request = pb.AddVariantRequest(name="models/m")
        codec.encode_variant(fakes.variant("more"), request.variant)
        await frontend.stub.AddVariant(request)
        await frontend.stub.TrainStep(frontend.train(b"a"))
        found = workers.splits
        assert found["more"].whole == "it took too long to find out"
    async with start() as frontend:
        workers = await ready(frontend)
        assert workers.splits == found
        assert not workers.expected, "the step after it brought none"
