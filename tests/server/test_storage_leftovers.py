"""What is left of models and checkpoints in the storage, by whom, and what others make of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.errors import FailedPrecondition, Unavailable
from gradwire_proto.v1 import dataset_pb2
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, TensorData
from gradwire_server.storage.checkpoint_store import CheckpointStore

SAVE = pb.CreateCheckpointRequest(parent="models/m", checkpoint_id="best")
DELETE = pb.DeleteModelRequest(name="models/m")


def take_over(storage: Path) -> None:
    """As another frontend does, where the lock does not reach."""
    (storage / "other").write_text("100\n")
    os.replace(storage / "other", storage / "epoch")


def dataset(dataset_id: str) -> dataset_pb2.CreateDatasetRequest:
    request = dataset_pb2.CreateDatasetRequest(dataset_id=dataset_id)
    codec.encode_batch(Batch(TensorData("float32", (1, 2), bytes(8))), request.batch)
    return request


def fetched(storage: Path) -> list[Path]:
    return [path for path in (storage / "checkpoints/.reading").rglob("*") if path.is_file()]


def slow_read(monkeypatch: Any) -> None:
    read = CheckpointStore.read

    def slowly(self: CheckpointStore, key: str) -> Any:
        saved = read(self, key)
        time.sleep(0.4)
        return saved

    monkeypatch.setattr(CheckpointStore, "read", slowly)


async def test_frontend_whose_storage_was_taken_over_deletes_and_makes_no_model(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        take_over(storage)
        error = await frontend.error(frontend.stub.DeleteModel(DELETE))
        assert (error.reason, error.outcome) == ("MODEL_FENCED", "not_applied")
        with pytest.raises(FailedPrecondition) as refused:
            frontend.tenant._storage.make("other", None)
        assert refused.value.reason == "MODEL_FENCED"
        assert [path.name for path in (storage / "models").iterdir()] == ["m"]
    async with start() as frontend:
        assert [model.name for model in (await frontend.stub.ListModels(pb.ListModelsRequest())).models] == ["models/m"]
        assert (await frontend.stub.TrainStep(frontend.train(b"b"))).result.step == 2


async def test_frontend_whose_storage_was_taken_over_deletes_and_makes_no_dataset(start: Any, storage: Path) -> None:
    async with start() as frontend:
        made = await frontend.stub.CreateDataset(dataset("kept"))
        take_over(storage)
        for refused in (
            frontend.stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=made.name)),
            frontend.stub.CreateDataset(dataset("other")),
        ):
            error = await frontend.error(refused)
            assert (error.reason, error.outcome) == ("MODEL_FENCED", "not_applied")
        assert await frontend.stub.GetDataset(dataset_pb2.GetDatasetRequest(name=made.name)) == made
    async with start() as frontend:
        assert list((await frontend.stub.ListDatasets(dataset_pb2.ListDatasetsRequest())).datasets) == [made]


async def test_deletion_that_failed_when_the_model_was_gone_does_not_say_that_nothing_was_done(
    start: Any, storage: Path, monkeypatch: Any
) -> None:
    def away(*_: Any) -> None:
        raise Unavailable("away", reason="STORAGE_UNREACHABLE", outcome="not_applied")

    async with start() as frontend:
        await frontend.create()
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointStore, "delete_automatic", away)
            error = await frontend.error(frontend.stub.DeleteModel(DELETE))
            assert (error.reason, error.outcome) == ("STORAGE_UNREACHABLE", "unknown")
        assert not (storage / "models/m").exists()
        await frontend.stub.DeleteModel(DELETE)
        assert not list(storage.glob("checkpoints/auto/*/m"))


async def test_checkpoint_that_nobody_waits_for_any_more_leaves_no_files(
    start: Any, storage: Path, monkeypatch: Any
) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateCheckpoint(SAVE)
        slow_read(monkeypatch)
        restore = pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="n")
        await frontend.error(frontend.stub.RestoreModel(restore, timeout=0.1))
        await frontend.until(lambda: fetched(storage))
        await frontend.until(lambda: not fetched(storage))


async def test_model_that_is_deleted_while_its_checkpoint_is_read_leaves_no_files(
    start: Any, storage: Path, monkeypatch: Any
) -> None:
    async with start() as frontend:
        await frontend.create()
    slow_read(monkeypatch)
    async with start(delete_seconds=0.05) as frontend:
        await frontend.until(lambda: fetched(storage))
        await frontend.stub.DeleteModel(DELETE)
        await frontend.until(lambda: not fetched(storage))


async def test_folder_of_another_name_among_the_named_ones_is_left_out_and_left_alone(
    start: Any, storage: Path
) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateCheckpoint(SAVE)
        stray = storage / "checkpoints/named/best.bak"
        shutil.copytree(storage / "checkpoints/named/best", stray)
        (storage / "checkpoints/named/Other").mkdir()
        listed = await frontend.stub.ListCheckpoints(pb.ListCheckpointsRequest())
        assert "checkpoints/best" in [each.name for each in listed.checkpoints] and len(listed.checkpoints) == 2
    async with start() as frontend:
        await asyncio.wait_for(frontend.tenant._storage.swept(), 5)
        assert stray.exists() and (storage / "checkpoints/named/Other").exists()
