"""What outlives a frontend, and the ranks of a model: every acknowledged command, once."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.errors import InvalidArgument, RankLost, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Batch, Handle, Retention, TensorData, Value
from gradwire_server.model_storage import ModelStorage
from gradwire_server.storage.blobs import Blobs
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.segment_writer import SegmentWriter
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.tensors.uploads import resolve


def steps(workers: Any) -> list[tuple[bytes, int]]:
    """(batch, number) of every training step that the ranks were asked for."""
    return [(call[1].rstrip(b"\0"), call[2]) for call in workers.calls if call[0] == "train_step"]


async def ready(frontend: Any, model_id: str = "m") -> Any:
    """The model's ranks, once it has been brought back."""
    async with asyncio.timeout(5):
        while (await frontend.model(model_id)).state != model_pb2.MODEL_STATE_READY:
            await asyncio.sleep(0.01)
    return frontend.cluster.groups[model_id]


def get_command(request_id: str) -> pb.GetCommandRequest:
    return pb.GetCommandRequest(name=f"models/m/commands/{request_id}", wait=True)


# --- a frontend that is started again ------------------------------------------------------------------------------


async def test_model_comes_back_with_every_command_in_order_and_goes_on_with_the_next_number(start: Any) -> None:
    async with start() as frontend:
        await frontend.create(labels={"team": "vision"})
        for value in (b"a", b"b", b"c"):
            await frontend.stub.TrainStep(frontend.train(value))
        before = await frontend.model()
    async with start() as frontend:
        workers = await ready(frontend)
        assert steps(workers) == [(b"a", 1), (b"b", 2), (b"c", 3)]
        assert await frontend.model() == before
        assert (await frontend.stub.TrainStep(frontend.train(b"d"))).result.step == 4
        assert steps(workers)[-1] == (b"d", 4)


async def test_repeat_runs_once_across_a_restart_and_gets_the_first_reply(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        request = frontend.train(b"a", request_id=fakes.request_id())
        first = await frontend.stub.TrainStep(request)
        await frontend.stub.TrainStep(frontend.train(b"b"))
    async with start() as frontend:
        # At once: whether it is a repeat is known only when the model is back.
        assert await frontend.stub.TrainStep(request) == first
        assert steps(frontend.cluster.groups["m"]) == [(b"a", 1), (b"b", 2)]
        command = await frontend.stub.GetCommand(get_command(request.request_id))
        assert command.state == model_pb2.COMMAND_STATE_APPLIED
        error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"x", request_id=request.request_id)))
        assert error.reason == "REQUEST_ID_REUSED"


async def test_refused_command_leaves_no_record(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create()
        workers.error = InvalidArgument("no")
        request = frontend.train(b"a", request_id=fakes.request_id())
        await frontend.error(frontend.stub.TrainStep(request))
        workers.error = None
        await frontend.stub.TrainStep(frontend.train(b"b"))
    async with start() as frontend:
        assert steps(await ready(frontend)) == [(b"b", 1)]
        assert (await frontend.error(frontend.stub.GetCommand(get_command(request.request_id)))).reason == (
            "COMMAND_NOT_FOUND"
        )


async def test_repeat_of_a_creation_finds_the_model_that_it_made(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        request = frontend.creation("", request_id=fakes.request_id())
        first = await frontend.stub.CreateModel(request)
    async with start() as frontend:
        assert await frontend.stub.CreateModel(request) == first
        models = (await frontend.stub.ListModels(pb.ListModelsRequest())).models
        assert [model.name for model in models] == [first.name]


async def test_requests_wait_for_a_model_that_is_brought_back_and_its_state_tells(start: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
    async with start(held=True) as frontend:
        waiting = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"b")))
        read = asyncio.ensure_future(frontend.stub.GetStateDict(pb.GetStateDictRequest(name="models/m")))
        await frontend.until(lambda: frontend.cluster.starting)
        assert (await frontend.model()).state == model_pb2.MODEL_STATE_RECOVERING
        assert (await frontend.stub.ListModels(pb.ListModelsRequest())).models[0].state == (
            model_pb2.MODEL_STATE_RECOVERING
        )
        late = await frontend.error(frontend.stub.TrainStep(frontend.train(b"c"), timeout=0.1))
        assert late.reason == "DEADLINE_EXCEEDED" and not waiting.done() and not read.done()
        frontend.cluster.gate.set()
        assert (await waiting).result.step == 2 and (await read).step in (1, 2)
        assert steps(await ready(frontend)) == [(b"a", 1), (b"b", 2)]


async def test_so_many_requests_wait_for_a_model_as_would_in_its_queue(start: Any) -> None:
    async with start() as frontend:
        await frontend.create()
    async with start(held=True, requests_per_model=2) as frontend:
        waiting = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(2)]
        await asyncio.sleep(0.1)
        error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
        assert error.reason == "QUEUE_FULL" and error.retry_after
        frontend.cluster.gate.set()
        assert sorted(reply.result.step for reply in await asyncio.gather(*waiting)) == [1, 2]


async def test_deleted_model_does_not_come_back_and_its_files_are_gone(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train())
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
        assert not list((storage / "models").iterdir()) and not list(storage.glob("checkpoints/auto/*/*"))
        await frontend.create()
    async with start() as frontend:
        assert steps(await ready(frontend)) == []


async def test_creation_or_deletion_that_was_cut_off_leaves_nothing(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
    # Its first checkpoint was written, and no more; and its folder was renamed, and no more.
    os.rename(storage / "models/m", storage / "models/.deleted-x")
    async with start() as frontend:
        assert not (await frontend.stub.ListModels(pb.ListModelsRequest())).models
        await frontend.until(lambda: not list(storage.glob("checkpoints/auto/*/*/*")))
        assert not list((storage / "models").iterdir())


async def test_corrupt_model_is_listed_as_failed_and_others_are_served(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.create("other")
        for model_id in ("m", "other"):
            await frontend.stub.TrainStep(frontend.train(model_id=model_id))
            await frontend.stub.TrainStep(frontend.train(model_id=model_id))
    (journal,) = (path for path in (storage / "models/m/journal").iterdir() if path.stat().st_size > 100)
    damaged = bytearray(journal.read_bytes())
    damaged[100] ^= 1
    journal.write_bytes(damaged)
    async with start() as frontend:
        assert len(steps(await ready(frontend, "other"))) == 2
        error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
        assert error.reason == "MODEL_FAILED" and str(journal) in error.message
        assert (await frontend.error(save(frontend, "best"))).reason == "MODEL_FAILED"
        model = await frontend.model()
        assert model.state == model_pb2.MODEL_STATE_FAILED and str(journal) in model.last_error.message
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))


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


# --- storage that does not do what it should -----------------------------------------------------------------------


async def test_full_disk_refuses_a_command_before_it_changes_the_model(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    workers = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    request = frontend.train(b"b", request_id=fakes.request_id())
    with monkeypatch.context() as patch:
        patch.setattr(SegmentWriter, "reserve", full)
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert (error.reason, error.outcome, error.retryable) == ("STORAGE_FULL", "not_applied", True)
        await frontend.stub.GetStateDict(pb.GetStateDictRequest(name="models/m"))
    assert steps(workers) == [(b"a", 1)]
    await frontend.stub.TrainStep(request)
    assert steps(workers) == [(b"a", 1), (b"b", 2)]


async def test_model_that_is_ahead_of_its_journal_is_saved_before_it_goes_on(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    write, failures = SegmentWriter.write, [OSError(errno.EIO, "Input/output error")]

    def fails_once(self: Any, parts: Any) -> Any:
        if failures:
            raise failures.pop()
        return write(self, parts)

    async with start() as frontend:
        workers = await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        request = frontend.train(b"b", request_id=fakes.request_id())
        monkeypatch.setattr(SegmentWriter, "write", fails_once)
        # A checkpoint can be taken all the same: then nothing is missing.
        assert (await frontend.stub.TrainStep(request)).result.step == 2
        assert not failures
        await frontend.stub.TrainStep(frontend.train(b"c"))
        assert steps(workers) == [(b"a", 1), (b"b", 2), (b"c", 3)]
    async with start() as frontend:
        workers = await ready(frontend)
        assert steps(workers) == [(b"c", 3)] and workers.step == 3
        assert (await frontend.stub.TrainStep(request)).result.step == 2


async def test_outcome_is_unknown_while_nothing_can_be_saved_and_settled_when_it_can(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.05)
    async with start() as frontend:
        workers = await frontend.create()
        request = frontend.train(b"a", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "write", broken)
            patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
            error = await frontend.error(frontend.stub.TrainStep(request))
            assert error.outcome == "unknown"
            refused = await frontend.error(frontend.stub.TrainStep(frontend.train(b"b")))
            assert refused.outcome == "not_applied" and steps(workers) == [(b"a", 1)]
        await asyncio.sleep(0.1)
        assert (await frontend.stub.TrainStep(frontend.train(b"c"))).result.step == 2
        assert (await frontend.stub.TrainStep(request)).result.step == 1
        assert steps(workers) == [(b"a", 1), (b"c", 2)]


async def test_command_that_no_journal_has_is_undone_when_its_ranks_are_lost_and_may_run_again(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.05)
    async with start() as frontend:
        old = await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        request = frontend.train(b"b", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "write", broken)
            patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
            assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "unknown"
            error = await frontend.error(frontend.stub.GetCommand(get_command(request.request_id)))
            assert error.outcome == "unknown"
        old.on_lost(RankLost("rank 0 died"))
        await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
        assert steps(await ready(frontend)) == [(b"a", 1)]
        command = await frontend.stub.GetCommand(get_command(request.request_id))
        assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED
        await asyncio.sleep(0.1)
        await frontend.stub.TrainStep(frontend.train(b"c"))
    async with start() as frontend:
        workers = await ready(frontend)
        assert (await frontend.stub.TrainStep(request)).result.step == 3
        assert steps(workers) == [(b"c", 2), (b"b", 3)]


@pytest.mark.parametrize("durability", ["process", "disk"])
async def test_command_that_was_applied_and_has_no_reply_is_recorded_although_the_journal_breaks(
    start: Any, fakes: Any, monkeypatch: Any, durability: str
) -> None:
    failing = {"process": "write", "disk": "sync"}[durability]
    original, failures = getattr(SegmentWriter, failing), [OSError(errno.EIO, "Input/output error")]

    def fails_once(self: Any, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(self, *arguments)

    async with start(durability=durability) as frontend:
        workers = await frontend.create()
        workers.error = ResourceExhausted("the answer did not fit", reason="REPLY_TOO_LARGE", outcome="applied")
        request = frontend.train(b"a", request_id=fakes.request_id())
        monkeypatch.setattr(SegmentWriter, failing, fails_once)
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert (error.reason, error.outcome) == ("REPLY_TOO_LARGE", "applied") and not failures
        workers.error = None
        await frontend.stub.TrainStep(frontend.train(b"b"))
    async with start() as frontend:
        assert steps(await ready(frontend)) == [(b"b", 2)]
        assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "applied"


async def test_command_in_the_journal_is_not_undone_although_its_fsync_fails_after_ranks_were_lost(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    may_sync = threading.Event()

    def sync(_: Any) -> None:
        assert may_sync.wait(5)
        raise OSError(errno.EIO, "Input/output error")

    async with start(durability="disk") as frontend:
        old = await frontend.create()
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "sync", sync)
            request = frontend.train(b"a", request_id=fakes.request_id())
            waiting = asyncio.ensure_future(frontend.stub.TrainStep(request))
            await frontend.until(lambda: steps(old))
            old.on_lost(RankLost("rank 0 died"))
            await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
            workers = await ready(frontend)
            assert steps(workers) == [(b"a", 1)] and not waiting.done()
            may_sync.set()
            # A checkpoint holds it in the end.
            assert (await waiting).result.step == 1
        await frontend.stub.TrainStep(request)
        assert steps(workers) == [(b"a", 1)]


async def test_large_command_is_written_without_holding_up_other_models(frontend: Any, monkeypatch: Any) -> None:
    workers, may_write, write = await frontend.create("m"), threading.Event(), SegmentWriter.write
    await frontend.create("other", durability="none")

    def slow(self: SegmentWriter, parts: Any) -> int:
        assert may_write.wait(5), "it is written on the event loop"
        return write(self, parts)

    monkeypatch.setattr(SegmentWriter, "write", slow)
    monkeypatch.setattr("gradwire_server.model_records.AHEAD_BYTES", 0)
    waiting = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(value))) for value in (b"a", b"b")]
    await frontend.until(lambda: steps(workers))
    assert (await frontend.stub.TrainStep(frontend.train(b"c", model_id="other"))).result.step == 1
    await asyncio.sleep(0.1)
    assert not waiting[0].done() and len(steps(workers)) == 1, "the next command of this one waits"
    may_write.set()
    assert [reply.result.step for reply in await asyncio.gather(*waiting)] == [1, 2]


async def test_store_that_does_not_answer_holds_up_nothing_else(frontend: Any, monkeypatch: Any) -> None:
    answers, asked, get = threading.Event(), [], CheckpointStore.get

    def hang(self: CheckpointStore, key: str) -> Any:
        asked.append(key)
        assert answers.wait(10)
        return get(self, key)

    await frontend.create("m")
    monkeypatch.setattr(CheckpointStore, "get", hang)
    request = pb.GetCheckpointRequest(name="models/m/checkpoints/0")
    waiting = [asyncio.ensure_future(frontend.stub.GetCheckpoint(request)) for _ in range(40)]
    try:
        # As many as there are threads, however many that are.
        await frontend.until(lambda: len(asked) > 5)
        await asyncio.sleep(0.2)
        async with asyncio.timeout(3):
            await frontend.create("other", durability="none")
    finally:
        answers.set()
    assert {found.name for found in await asyncio.gather(*waiting)} == {"models/m/checkpoints/0"}


async def test_service_that_shares_the_checkpoints_takes_no_model_from_another(
    start: Any, storage: Path, tmp_path: Path
) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
    lock = StorageLock.take(tmp_path / "another storage", 1.0)
    shared = CheckpointStore(
        str(storage / "checkpoints"), tmp_path / "fetched", owner=lock.storage_id, fence=lock.check
    )
    another = ModelStorage(lock, shared)
    assert another.open() == {}
    another.begin_sweep()
    await another.swept()
    another.delete("m")
    lock.release()
    async with start() as frontend:
        assert steps(await ready(frontend)) == [(b"a", 1)]


async def test_newest_checkpoint_that_is_damaged_gives_way_to_the_one_before(start: Any, storage: Path) -> None:
    async with start(checkpoint_commands=2) as frontend:
        await frontend.create()
        for value in (b"a", b"b", b"c"):
            await frontend.stub.TrainStep(frontend.train(value))
        await frontend.until(lambda: list(storage.glob("checkpoints/auto/*/m/2/manifest.json")))
    (weights,) = storage.glob("checkpoints/auto/*/m/2/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    async with start() as frontend:
        assert steps(await ready(frontend)) == [(b"a", 1), (b"b", 2), (b"c", 3)]


async def test_frontend_whose_storage_was_taken_over_acknowledges_nothing(
    frontend: Any, storage: Path, fakes: Any
) -> None:
    workers = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    (storage / "other").write_text("100\n")
    os.replace(storage / "other", storage / "epoch")
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"b")))
    assert (error.reason, error.outcome) == ("MODEL_FENCED", "unknown")
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"c")))
    assert (error.reason, error.outcome) == ("MODEL_FENCED", "not_applied")
    assert steps(workers) == [(b"a", 1), (b"b", 2)]


async def test_at_disk_the_model_goes_on_while_answers_wait_for_their_fsync(start: Any, monkeypatch: Any) -> None:
    may_sync, synced = threading.Event(), SegmentWriter.sync

    def sync(self: Any) -> None:
        assert may_sync.wait(5)
        synced(self)

    monkeypatch.setattr(SegmentWriter, "sync", sync)
    async with start(durability="disk") as frontend:
        workers = await frontend.create()
        calls = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(3)]
        await frontend.until(lambda: len(workers.calls) == 3)
        read = asyncio.ensure_future(frontend.stub.GetStateDict(pb.GetStateDictRequest(name="models/m")))
        await asyncio.sleep(0.1)
        assert not any(call.done() for call in calls) and not read.done()
        may_sync.set()
        assert [reply.result.step for reply in await asyncio.gather(*calls)] == [1, 2, 3]
        assert (await read).step == 3


# --- ranks that are lost -------------------------------------------------------------------------------------------


async def test_command_that_meets_a_lost_rank_runs_again_on_new_ranks_and_takes_longer(
    frontend: Any, fakes: Any
) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.error = RankLost("rank 1 died", outcome="unknown")
    reply = await frontend.stub.TrainStep(frontend.train(b"b"))
    new = frontend.cluster.groups["m"]
    assert new is not old and old.closed == [False] and old.salvaged == [1]
    assert old.vacated and frontend.cluster.places == [None, old], "nobody else could have had its place"
    assert steps(new) == [(b"a", 1), (b"b", 2)] and reply.result.step == 2
    assert reply.result.timing.recovery > 0
    assert (await frontend.stub.TrainStep(frontend.train(b"c"))).result.timing.recovery == 0
    model = await frontend.model()
    assert model.state == model_pb2.MODEL_STATE_READY and "rank 1 died" in model.last_error.message


async def test_state_of_a_rank_that_is_left_is_taken_before_the_journal(frontend: Any, fakes: Any) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.kept = old.now()
    old.error = RankLost("rank 1 died", outcome="unknown")
    assert (await frontend.stub.TrainStep(frontend.train(b"b"))).result.step == 2
    assert steps(frontend.cluster.groups["m"]) == [(b"b", 2)]


async def test_ranks_that_are_lost_while_nothing_runs_are_replaced_at_once(frontend: Any) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
    assert steps(await ready(frontend)) == [(b"a", 1)]


async def test_command_that_loses_its_ranks_twice_is_refused_for_good_and_the_model_goes_on(
    start: Any, fakes: Any
) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        frontend.cluster.deadly = b"x"
        request = frontend.train(b"x", request_id=fakes.request_id())
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert (error.reason, error.outcome) == ("COMMAND_KILLS_RANKS", "not_applied")
        await frontend.stub.TrainStep(frontend.train(b"b"))
        started = len(frontend.cluster.started)
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"
        assert len(frontend.cluster.started) == started == 3
    async with start() as frontend:
        workers = await ready(frontend)
        assert [batch for batch, _ in steps(workers)] == [b"a", b"b"]
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"


async def test_command_of_which_nobody_knows_what_it_left_behind_is_undone(frontend: Any, fakes: Any) -> None:
    old = await frontend.create()
    old.kept = old.now()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    old.error = RuntimeError("a defect")
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"b")))
    assert error.outcome == "not_applied" and not old.salvaged
    assert (await frontend.stub.TrainStep(frontend.train(b"c"))).result.step == 2
    assert steps(frontend.cluster.groups["m"]) == [(b"a", 1), (b"c", 2)]


async def test_backward_of_a_forward_that_lost_ranks_had_retained_works(frontend: Any, fakes: Any) -> None:
    old = await frontend.create()
    request = pb.ForwardRequest(name="models/m")
    codec.encode_value(fakes.two_floats(), request.inputs)
    codec.encode_retention(Retention(), request.retain)
    name = (await frontend.stub.Forward(request)).retained
    old.on_lost(RankLost("rank 0 died"))
    back = pb.BackwardRequest(name="models/m", retained=name)
    codec.encode_cotangents([fakes.two_floats()], back)
    await frontend.stub.Backward(back)
    assert [call[0] for call in frontend.cluster.groups["m"].calls] == ["retained_forward", "backward"]


# --- checkpoints that clients ask for ------------------------------------------------------------------------------


async def save(frontend: Any, name: str, request_id: str = "") -> Any:
    request = pb.CreateCheckpointRequest(parent="models/m", checkpoint_id=name, request_id=request_id)
    return await frontend.stub.CreateCheckpoint(request)


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


async def test_checkpoint_that_a_model_is_brought_back_from_is_not_deleted(frontend: Any) -> None:
    await frontend.create()
    name = "models/m/checkpoints/0"
    assert (await frontend.stub.GetCheckpoint(pb.GetCheckpointRequest(name=name))).automatic
    error = await frontend.error(frontend.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(name=name)))
    assert error.reason == "CHECKPOINT_NEEDED"


async def test_model_of_one_rank_restored_to_several_computes_batches_whole(frontend: Any) -> None:
    await frontend.create()
    await save(frontend, "best")
    request = pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="wide", workers=2)
    assert (await frontend.stub.RestoreModel(request)).workers == 2
    _, state = frontend.cluster.started[-1]
    assert "one rank" in state.splits["train"].whole


async def test_checkpoint_that_is_not_there_is_not_found(frontend: Any) -> None:
    request = pb.RestoreModelRequest(checkpoint="checkpoints/none")
    assert (await frontend.error(frontend.stub.RestoreModel(request))).reason == "CHECKPOINT_NOT_FOUND"


@pytest.mark.parametrize("durability", ["process", "disk", "none"])
async def test_description_tells_what_an_answer_promises(start: Any, durability: str) -> None:
    async with start(durability=durability, checkpoint_commands=7) as frontend:
        await frontend.create()
        info = codec.decode_model_info(await frontend.model())
        assert info.durability == durability
        assert (info.checkpoint_every, info.keep_checkpoints) == ((0, 0) if durability == "none" else (7, 2))


def test_handles_name_what_they_named(fakes: Any) -> None:
    value = {"x": [TensorData("float32", (1, 2), Handle("uploads/u/tensors/1")), 3]}
    assert resolve(value, {"uploads/u": [fakes.two_floats(b"a" * 8), fakes.two_floats()]}) == {
        "x": [fakes.two_floats(), 3]
    }
