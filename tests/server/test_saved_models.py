"""Checkpoints that clients ask for: saved, restored and deleted, once each."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

from server.brought_back import ready, save, steps

from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.deletion_notes import DeletionNotes


async def test_saved_model_is_restored_under_another_name_and_goes_on_from_there(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        saved = await save(frontend, "best", request_id := fakes.request_id())
        assert (saved.name, saved.step, saved.command, saved.automatic) == ("checkpoints/best", 1, 1, False)
        assert await save(frontend, "best", request_id) == saved
        assert (await frontend.error(save(frontend, "best", fakes.request_id()))).reason == "CHECKPOINT_EXISTS"
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
        request = pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="again", request_id=fakes.request_id())
        model = await frontend.stub.RestoreModel(request)
        assert (model.name, model.step, model.state) == ("models/again", 1, model_pb2.MODEL_STATE_READY)
        await frontend.stub.TrainStep(frontend.train(b"b", model_id="again"))
        assert steps(frontend.cluster.groups["again"]) == [(b"b", 2)]
    async with start() as frontend:
        assert await frontend.stub.RestoreModel(request) == model
        assert steps(await ready(frontend, "again")) == [(b"b", 2)]
        listed = (await frontend.stub.ListCheckpoints(pb.ListCheckpointsRequest(page_size=1))).checkpoints
        assert [each.name for each in listed] == ["checkpoints/best"]
        await frontend.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(name="checkpoints/best"))
        error = await frontend.error(frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name="checkpoints/best")))
        assert error.reason == "CHECKPOINT_NOT_FOUND"


async def test_repeated_deletion_leaves_alone_the_checkpoint_that_was_saved_since(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    await save(frontend, "best", fakes.request_id())
    deletion = pb.DeleteCheckpointRequest(name="checkpoints/best", request_id=fakes.request_id())
    await frontend.stub.DeleteCheckpoint(deletion)
    saved = await save(frontend, "best", fakes.request_id())
    await frontend.stub.DeleteCheckpoint(deletion)
    assert await frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name="checkpoints/best")) == saved
    deletion.request_id = fakes.request_id()
    await frontend.stub.DeleteCheckpoint(deletion)
    error = await frontend.error(frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name="checkpoints/best")))
    assert error.reason == "CHECKPOINT_NOT_FOUND"


async def test_deletion_of_a_checkpoint_whose_caller_is_gone_is_remembered(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    await frontend.create()
    await save(frontend, "best", fakes.request_id())
    go, delete = threading.Event(), CheckpointStore.delete

    def slowly(self: Any, key: str) -> None:
        go.wait(5)
        delete(self, key)

    monkeypatch.setattr(CheckpointStore, "delete", slowly)
    deletion = pb.DeleteCheckpointRequest(name="checkpoints/best", request_id=fakes.request_id())
    call = frontend.stub.DeleteCheckpoint(deletion, timeout=0.3)
    assert (await frontend.error(call)).reason == "DEADLINE_EXCEEDED"
    again = asyncio.ensure_future(frontend.stub.DeleteCheckpoint(deletion))
    go.set()
    await again
    saved = await save(frontend, "best", fakes.request_id())
    await frontend.stub.DeleteCheckpoint(deletion)
    assert await frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name="checkpoints/best")) == saved


async def test_repeated_deletions_leave_alone_what_was_made_since_also_after_a_restart(
    start: Any, fakes: Any, storage: Path
) -> None:
    async with start() as frontend:
        await frontend.create()
        await save(frontend, "best")
        checkpoint = pb.DeleteCheckpointRequest(name="checkpoints/best", request_id=fakes.request_id())
        await frontend.stub.DeleteCheckpoint(checkpoint)
        await save(frontend, "best")
        model = pb.DeleteModelRequest(name="models/m", request_id=fakes.request_id())
        await frontend.stub.DeleteModel(model)
        await frontend.create()
        missing = pb.DeleteModelRequest(name="models/later", request_id=fakes.request_id())
        assert (await frontend.error(frontend.stub.DeleteModel(missing))).reason == "MODEL_NOT_FOUND"
    async with start() as frontend:
        await frontend.stub.DeleteModel(model)
        await frontend.stub.DeleteCheckpoint(checkpoint)
        await ready(frontend)
        await frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name="checkpoints/best"))
        await frontend.create("later")
        await frontend.stub.DeleteModel(missing)
        assert (await frontend.error(frontend.model("later"))).reason == "MODEL_NOT_FOUND"
        assert len(list((storage / "deletions").iterdir())) == 3


async def test_deletion_is_noted_before_it_is_answered_and_its_repeat_waits_for_that(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    may_write, write = threading.Event(), DeletionNotes.write

    def slowly(self: DeletionNotes, note: Any) -> None:
        assert may_write.wait(5)
        write(self, note)

    monkeypatch.setattr(DeletionNotes, "write", slowly)
    await frontend.create()
    deletion = pb.DeleteModelRequest(name="models/m", request_id=fakes.request_id())
    first = asyncio.ensure_future(frontend.stub.DeleteModel(deletion))
    async with asyncio.timeout(5):
        while (await frontend.stub.ListModels(pb.ListModelsRequest())).models:
            await asyncio.sleep(0.01)
    await frontend.create()
    again = asyncio.ensure_future(frontend.stub.DeleteModel(deletion))
    await asyncio.sleep(0.1)
    assert not first.done() and not again.done()
    may_write.set()
    await asyncio.gather(first, again)
    await ready(frontend)


async def test_deletion_that_cannot_be_noted_is_answered_all_the_same(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    await frontend.create()
    await save(frontend, "best")
    monkeypatch.setattr("gradwire_server.storage.deletion_notes.replace_file", full)
    deletion = pb.DeleteCheckpointRequest(name="checkpoints/best", request_id=fakes.request_id())
    await frontend.stub.DeleteCheckpoint(deletion)
    await frontend.stub.DeleteCheckpoint(deletion)


async def test_checkpoint_that_a_model_is_brought_back_from_is_not_deleted(frontend: Any) -> None:
    await frontend.create()
    name = "models/m/checkpoints/0"
    assert (await frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name=name))).automatic
    error = await frontend.error(frontend.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(name=name)))
    assert error.reason == "CHECKPOINT_NEEDED"


async def test_model_is_restored_to_another_number_of_ranks(frontend: Any) -> None:
    await frontend.create()
    await save(frontend, "best")
    request = pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="wide", workers=2)
    assert (await frontend.stub.RestoreModel(request)).workers == 2


async def test_checkpoint_that_is_not_there_is_not_found(frontend: Any) -> None:
    request = pb.RestoreModelRequest(checkpoint="checkpoints/none")
    assert (await frontend.error(frontend.stub.RestoreModel(request))).reason == "CHECKPOINT_NOT_FOUND"
