"""Storage that does not do what it should: what is acknowledged outlives it all the same, once."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from server.brought_back import get_command, ready, steps

from gradwire_proto import codec
from gradwire_proto.errors import RankLost, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Handle, TensorData
from gradwire_server.model_storage import ModelStorage
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.segment_writer import SegmentWriter
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.tensors.uploads import resolve


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
    workers.gate.clear()
    running = asyncio.ensure_future(frontend.error(frontend.stub.TrainStep(frontend.train(b"b"))))
    await frontend.until(lambda: workers.busy)
    (storage / "other").write_text("100\n")
    os.replace(storage / "other", storage / "epoch")
    workers.gate.set()
    error = await running
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
        assert (await frontend.model()).step == 0, "nobody sees what a loss of power may undo"
        assert (await frontend.stub.ListModels(pb.ListModelsRequest())).models[0].step == 0
        may_sync.set()
        assert (await calls[0]).result.step == 1 <= (await frontend.model()).step
        assert [reply.result.step for reply in await asyncio.gather(*calls)] == [1, 2, 3]
        assert (await frontend.model()).step == 3 == (await read).step


async def test_step_whose_fsync_failed_is_shown_once_a_checkpoint_holds_it(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.05)
    async with start(durability="disk") as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
        request = frontend.train(b"b", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "sync", broken)
            patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
            assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "unknown"
            assert (await frontend.model()).step == 1
        await asyncio.sleep(0.1)
        # Who asks has it saved.
        await frontend.stub.GetCommand(get_command(request.request_id))
        assert (await frontend.model()).step == 2


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
