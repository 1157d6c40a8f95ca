"""Datasets, as any client would ask for them."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from server.fit_requests import EXAMPLES, creation, fit, told

from gradwire_proto import codec
from gradwire_proto.errors import DatasetNotFound
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_proto.values import Batch, Handle, TensorData
from gradwire_server import datasets
from gradwire_server.storage.dataset_files import StoredDataset, write_dataset


async def test_dataset_is_described_listed_and_gone_once_deleted(frontend: Any) -> None:
    made = await frontend.stub.CreateDataset(creation())
    assert (made.num_examples, made.size_bytes, list(made.inputs.tensor.shape)) == (10, 80, [10, 2])
    assert await frontend.stub.GetDataset(pb.GetDatasetRequest(name="datasets/d")) == made
    assert list((await frontend.stub.ListDatasets(pb.ListDatasetsRequest())).datasets) == [made]
    await frontend.stub.DeleteDataset(pb.DeleteDatasetRequest(name="datasets/d"))
    error = await frontend.error(frontend.stub.GetDataset(pb.GetDatasetRequest(name="datasets/d")))
    assert isinstance(error, DatasetNotFound) and error.resource == "datasets/d"


async def test_dataset_with_a_time_goes_when_no_fit_used_it_for_so_long(start: Any, fakes: Any) -> None:
    request = creation()
    request.ttl.FromMilliseconds(400)
    async with start() as frontend:
        workers = await frontend.create()
        made = await frontend.stub.CreateDataset(request)
        assert made.ttl.ToMilliseconds() == 400
        await asyncio.sleep(0.2)
        workers.gate.clear()
        running = asyncio.ensure_future(told(frontend, fit(fakes.request_id())))
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.6)
        assert await frontend.stub.GetDataset(pb.GetDatasetRequest(name="datasets/d")) == made
        workers.gate.set()
        assert (await running)[1] is None
        await asyncio.sleep(0.2)
        assert await frontend.stub.GetDataset(pb.GetDatasetRequest(name="datasets/d")) == made
    async with start() as frontend:
        # From its start on it stays as long again.
        assert await frontend.stub.GetDataset(pb.GetDatasetRequest(name="datasets/d")) == made
        held = frontend.tenant.tensors.held
        await frontend.until(lambda: not frontend.tenant._datasets._stored)
        assert held.count == 0
        error = await frontend.error(frontend.stub.GetDataset(pb.GetDatasetRequest(name="datasets/d")))
        assert isinstance(error, DatasetNotFound)


async def test_dataset_whose_time_is_over_and_cannot_be_deleted_is_tried_again(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = creation()
    request.ttl.FromMilliseconds(100)
    tries, forget = [], StoredDataset.forget

    def fails_twice(self: StoredDataset, durable: bool) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EIO, "the disk is ill")
        forget(self, durable)

    monkeypatch.setattr(StoredDataset, "forget", fails_twice)
    await frontend.stub.CreateDataset(request)
    await frontend.until(lambda: len(tries) == 3)
    await frontend.until(lambda: not frontend.tenant._datasets._stored)


@pytest.mark.parametrize("seconds", [0, -1, 30 * 86_400 + 1])
async def test_time_of_a_dataset_has_bounds(frontend: Any, seconds: int) -> None:
    request = creation()
    request.ttl.FromSeconds(seconds)
    error = await frontend.error(frontend.stub.CreateDataset(request))
    assert (error.reason, error.field) == ("NUMBER_OUT_OF_RANGE", "ttl") and "2592000" in str(error)


async def test_dataset_is_refused_where_rows_differ_or_its_name_is_taken(frontend: Any) -> None:
    request = pb.CreateDatasetRequest()
    codec.encode_batch(
        Batch(TensorData("float32", (2, 1), bytes(8)), TensorData("float32", (1,), bytes(4))), request.batch
    )
    error = await frontend.error(frontend.stub.CreateDataset(request))
    assert (error.reason, error.field) == ("DATASET_ROWS", "batch.targets")
    request.Clear()
    codec.encode_batch(Batch(TensorData("float32", (1 << 20, 0), b"")), request.batch)
    error = await frontend.error(frontend.stub.CreateDataset(request))
    assert (error.reason, error.field) == ("DATASET_ROWS", "batch.inputs") and "at least a byte in each" in str(error)
    await frontend.stub.CreateDataset(creation())
    assert (await frontend.error(frontend.stub.CreateDataset(creation()))).reason == "DATASET_EXISTS"


async def test_datasets_count_as_held_until_they_are_deleted(start: Any) -> None:
    async with start(held_bytes=100) as frontend:
        upload = await frontend.upload(TensorData("float32", (10, 2), EXAMPLES))
        await frontend.stub.CreateDataset(creation(Handle(f"{upload}/tensors/0")))
        error = await frontend.error(frontend.stub.CreateDataset(creation(dataset_id="e")))
        assert error.reason == "HELD_BYTES_EXHAUSTED"
        await frontend.stub.DeleteDataset(pb.DeleteDatasetRequest(name="datasets/d"))
        await frontend.stub.CreateDataset(creation(dataset_id="e"))
    async with start(held_bytes=100) as frontend:
        error = await frontend.error(frontend.stub.CreateDataset(creation()))
        assert error.reason == "HELD_BYTES_EXHAUSTED"


async def test_repeat_of_a_creation_finds_the_dataset_also_after_a_restart(start: Any, fakes: Any) -> None:
    request = creation(dataset_id="", request_id=fakes.request_id())
    async with start() as frontend:
        first = await frontend.stub.CreateDataset(request)
        assert await frontend.stub.CreateDataset(request) == first
    async with start() as frontend:
        assert await frontend.stub.CreateDataset(request) == first
        other = creation(bytes(80), dataset_id="", request_id=request.request_id)
        assert (await frontend.error(frontend.stub.CreateDataset(other))).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("dataset_id", ["", "d"])
async def test_repeat_of_a_creation_joins_the_one_that_is_still_writing(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch, dataset_id: str
) -> None:
    go_on, writing = threading.Event(), []

    def slowly(*arguments: Any, **how: Any) -> Any:
        writing.append(arguments)
        assert go_on.wait(10.0)
        return write_dataset(*arguments, **how)

    monkeypatch.setattr(datasets, "write_dataset", slowly)
    request = creation(dataset_id=dataset_id, request_id=fakes.request_id())
    first = asyncio.ensure_future(frontend.stub.CreateDataset(request))
    await frontend.until(lambda: writing)
    other = creation(bytes(80), dataset_id=dataset_id, request_id=request.request_id)
    assert (await frontend.error(frontend.stub.CreateDataset(other))).reason == "REQUEST_ID_REUSED"
    repeat = asyncio.ensure_future(frontend.stub.CreateDataset(request))
    await frontend.stub.ListDatasets(pb.ListDatasetsRequest())
    go_on.set()
    made = await first
    assert await repeat == made
    assert list((await frontend.stub.ListDatasets(pb.ListDatasetsRequest())).datasets) == [made]


async def test_making_that_fails_when_its_caller_is_gone_is_no_error_that_nobody_looked_at(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, writing, unseen = threading.Event(), [], []

    def fail(*_: Any, **__: Any) -> Any:
        writing.append(True)
        assert go_on.wait(10.0)
        raise OSError("no room")

    monkeypatch.setattr(datasets, "write_dataset", fail)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    caller = asyncio.ensure_future(frontend.stub.CreateDataset(creation()))
    await frontend.until(lambda: writing)
    caller.cancel()
    await frontend.until(lambda: not frontend.tenant.admission.in_flight)
    go_on.set()
    await frontend.until(lambda: not frontend.tenant._datasets._making)
    gc.collect()
    assert not unseen


async def test_dataset_whose_making_failed_at_the_last_fsync_is_not_there_after_a_restart(
    start: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = creation(dataset_id="", request_id=fakes.request_id())
    async with start(durability="disk") as frontend:
        with monkeypatch.context() as patched:
            patched.setattr(datasets, "sync_folder", lambda _: os.fstat(-1))
            error = await frontend.error(frontend.stub.CreateDataset(request))
        assert error.reason == "STORAGE_UNREACHABLE"
    async with start(durability="disk") as frontend:
        assert not (await frontend.stub.ListDatasets(pb.ListDatasetsRequest())).datasets


async def test_of_two_datasets_with_one_id_in_the_storage_the_newer_one_comes_back(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.stub.CreateDataset(creation())
        # As if its making had failed, and nothing of it could be removed.
        (older,) = (storage / "datasets").iterdir()
        older.rename(storage / "kept")
    async with start() as frontend:
        newer = await frontend.stub.CreateDataset(creation(rows=5, data=EXAMPLES[:40]))
        (storage / "kept").rename(older)
    async with start(held_bytes=80) as frontend:
        assert list((await frontend.stub.ListDatasets(pb.ListDatasetsRequest())).datasets) == [newer]
        assert not older.exists()
        await frontend.stub.CreateDataset(creation(dataset_id="e", rows=5, data=EXAMPLES[:40]))


async def test_service_that_ends_waits_for_the_dataset_that_it_writes(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, written = [], []

    def slowly(*arguments: Any, **how: Any) -> Any:
        writing.append(arguments)
        time.sleep(0.2)
        written.append(stored := write_dataset(*arguments, **how))
        return stored

    monkeypatch.setattr(datasets, "write_dataset", slowly)
    async with start() as frontend:
        creating = asyncio.ensure_future(frontend.stub.CreateDataset(creation()))
        await frontend.until(lambda: writing)
    assert written and written[0].folder.exists()
    await asyncio.gather(creating, return_exceptions=True)
