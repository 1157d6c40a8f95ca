"""What fits outlive: restarts of the frontend, lost ranks, and a service that ends."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from typing import Any

import grpc
import pytest
from server.brought_back import ready
from server.fit_requests import EXAMPLES, creation, fit, losses, told

from gradwire_proto import codec
from gradwire_proto.errors import RankLost
from gradwire_proto.status import from_rpc_error
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2
from gradwire_proto.values import FitSteps
from gradwire_server import fit as fit_module
from gradwire_server import request_log


async def test_fit_goes_on_after_a_restart_and_its_dataset_may_be_deleted(start: Any, fakes: Any) -> None:
    request = fit(fakes.request_id(), shuffle=True, validation_dataset="datasets/d")
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateDataset(creation())
        messages, _ = await told(frontend, request)
        before = frontend.cluster.groups["m"].fitting.applied
        await frontend.stub.TrainStep(frontend.train(b"b"))
        await frontend.stub.DeleteDataset(pb.DeleteDatasetRequest(name="datasets/d"))
    async with start() as frontend:
        workers = await ready(frontend)
        assert workers.fitting.applied == before
        assert set(workers.fitting.examples) == {EXAMPLES}
        assert workers.calls[-2][2] == 10
        assert workers.calls[-1] == ("forget",)
    # What the client had not heard yet is told, and applied no more: the dataset is another of that name by now.
    async with start() as frontend:
        await ready(frontend)
        await frontend.stub.CreateDataset(creation(bytes(80)))
        _, error = await told(frontend, request)
        assert error is not None and error.reason == "REQUEST_ID_REUSED"
    assert losses(messages) == [float(step) for step in range(9)]


async def test_records_of_a_version_that_wrote_rows_for_a_seed_are_applied_once_more(
    start: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = codec.encode_fit_steps

    def encode_rows(value: FitSteps, model_id: str, request_id: str) -> pb.FitStepsRequest:
        rows = range(value.first_step * 5, (value.first_step + value.steps) * 5)
        packed = b"".join(struct.pack("<I", 9 - row % 10) for row in rows)
        return encode(replace(value, seed=None, rows=packed), model_id, request_id)

    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateDataset(creation())
        with monkeypatch.context() as older:
            older.setattr(codec, "encode_fit_steps", encode_rows)
            await told(frontend, fit(fakes.request_id(), shuffle=True, batch_size=5))
    async with start() as frontend:
        workers = await ready(frontend)
        assert [rows for _, _, rows in workers.fitting.applied] == [(9, 8, 7, 6, 5), (4, 3, 2, 1, 0)] * 3


async def test_repeat_after_a_restart_hears_the_losses_that_it_missed(start: Any, fakes: Any) -> None:
    request = fit(fakes.request_id(), validation_dataset="datasets/d")
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateDataset(creation())
        messages, _ = await told(frontend, request)
    async with start() as frontend:
        workers = await ready(frontend)
        count = len(workers.fitting.applied)
        request.completed_steps = 1
        again, error = await told(frontend, request)
        assert error is None
        assert losses(again) == losses(messages)[1:]
        assert [each.validation_loss for each in again if each.HasField("validation_loss")] == [103.0, 106.0, 109.0]
        assert len(workers.fitting.applied) == count


async def test_fit_of_which_a_checkpoint_tells_goes_on_where_it_was(
    start: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "_KEPT", 1)
    request = fit(fakes.request_id())
    async with start(checkpoint_commands=1) as frontend:
        await frontend.create()
        await frontend.stub.CreateDataset(creation())
        await told(frontend, request)
        checkpoints = frontend.tenant._storage.checkpoints
        await frontend.until(lambda: checkpoints.automatic("m")[0] == 9)
    async with start() as frontend:
        workers = await ready(frontend)
        # Nothing but that request's own replies is looked at, on the event loop.
        monkeypatch.setattr(request_log, "stored_reply_of", None)
        request.completed_steps = 2
        again, error = await told(frontend, request)
        assert error is not None and (again, error.reason) == ([], "REPLY_FORGOTTEN")
        assert losses((await told(frontend, fit(fakes.request_id())))[0]) == [float(step) for step in range(9)]
        assert len(workers.fitting.applied) == 9


async def test_lost_ranks_are_replaced_in_the_middle_of_a_fit(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    await frontend.stub.CreateDataset(creation())
    stream = frontend.stub.Fit(fit(fakes.request_id(), epochs=20))
    messages = aiter(stream)
    first = await anext(messages)
    workers = frontend.cluster.groups["m"]
    workers.error = RankLost("rank 0 died", outcome="unknown")
    rest = [message async for message in messages]
    assert losses([first, *rest]) == [float(step) for step in range(60)]
    assert [step for _, step, _ in frontend.cluster.groups["m"].fitting.applied] == list(range(60))


async def test_fits_end_when_the_service_drains(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateDataset(creation())
        stream = frontend.stub.Fit(fit(fakes.request_id(), epochs=1_000_000))
        messages = aiter(stream)
        await anext(messages)
        async with asyncio.timeout(5):
            await frontend.service.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [message async for message in messages]
        error = from_rpc_error(caught.value, command=True)
        assert (error.reason, error.retryable) == ("DRAINING", True)


async def test_no_client_sends_what_the_journal_records_of_a_fit() -> None:
    service = gradient_service_pb2.DESCRIPTOR.services_by_name["GradientService"]
    assert "FitSteps" not in service.methods_by_name
