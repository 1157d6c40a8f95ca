"""Models whose storage, or whose ranks, fail again while they are brought back: nothing runs twice, nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.errors import RankLost, ResourceExhausted, Unavailable
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import Retention
from gradwire_server.calls import Call
from gradwire_server.model_storage import ModelStorage
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.local_folders import LocalFolders
from gradwire_server.storage.segment_writer import SegmentWriter


def steps(workers: Any) -> list[tuple[bytes, int]]:
    """(batch, number) of every training step that the ranks were asked for."""
    return [(call[1].rstrip(b"\0"), call[2]) for call in workers.calls if call[0] == "train_step"]


async def ready(frontend: Any) -> Any:
    """The model's ranks, once it has been brought back."""
    async with asyncio.timeout(5):
        while (info := await frontend.model()).state != model_pb2.MODEL_STATE_READY:
            assert info.state != model_pb2.MODEL_STATE_FAILED, info.last_error.message
            await asyncio.sleep(0.01)
    return frontend.cluster.groups["m"]


async def lose_ranks(frontend: Any) -> Any:
    """Lose the model's ranks; those that take their place."""
    old = frontend.cluster.groups["m"]
    old.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
    return await ready(frontend)


def broken(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def once(function: Any) -> Any:
    """The function, failing the first time."""
    failures = [1]

    def fails_once(*arguments: Any) -> Any:
        if failures:
            failures.pop()
            broken()
        return function(*arguments)

    return fails_once


def get_command(request: Any) -> pb.GetCommandRequest:
    return pb.GetCommandRequest(name=f"models/m/commands/{request.request_id}")


def save(name: str) -> pb.CreateCheckpointRequest:
    return pb.CreateCheckpointRequest(parent="models/m", checkpoint_id=name)


def forward(fakes: Any) -> pb.ForwardRequest:
    request = pb.ForwardRequest(name="models/m")
    codec.encode_value(fakes.two_floats(), request.inputs)
    codec.encode_retention(Retention(), request.retain)
    return request


def backward(fakes: Any, name: str) -> pb.BackwardRequest:
    request = pb.BackwardRequest(name="models/m", retained=name)
    codec.encode_cotangents([fakes.two_floats()], request)
    return request


# --- what becomes of commands that the storage could not take -----------------------------------------------------


async def test_command_that_a_checkpoint_holds_counts_although_its_journal_cannot_go_on(
    frontend: Any, fakes: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    await frontend.create()
    request = frontend.train(b"a", request_id=fakes.request_id())
    with monkeypatch.context() as patch:
        patch.setattr(SegmentWriter, "write", broken)
        assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "unknown"
        assert (await lose_ranks(frontend)).step == 1
        command = await frontend.stub.GetCommand(get_command(request))
        assert command.state == model_pb2.COMMAND_STATE_APPLIED
        assert (await frontend.stub.TrainStep(request)).result.step == 1
    assert (await frontend.stub.TrainStep(frontend.train(b"b"))).result.step == 2


@pytest.mark.parametrize("asked_first", [True, False])
async def test_command_of_unknown_outcome_is_settled_by_who_asks_for_it_when_the_storage_is_back(
    start: Any, fakes: Any, monkeypatch: Any, asked_first: bool
) -> None:
    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    async with start(durability="disk") as frontend:
        await frontend.create()
        request = frontend.train(b"a", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "sync", broken)
            patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
            assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "unknown"
            assert steps(await lose_ranks(frontend)) == [(b"a", 1)]
            assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "unknown"
        if asked_first:
            command = await frontend.stub.GetCommand(get_command(request))
            assert command.state == model_pb2.COMMAND_STATE_APPLIED
        assert (await frontend.stub.TrainStep(request)).result.step == 1
        assert steps(frontend.cluster.groups["m"]) == [(b"a", 1)]


async def test_retained_forwards_go_with_the_journal_that_had_them(start: Any, fakes: Any, monkeypatch: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create()
        name = (await frontend.stub.Forward(forward(fakes))).retained
        monkeypatch.setattr(SegmentWriter, "write", once(SegmentWriter.write))
        await frontend.stub.TrainStep(frontend.train(b"a"))
        assert not workers.retained.kept
        assert (await frontend.error(frontend.stub.Backward(backward(fakes, name)))).reason == "RETAINED_GONE"
        name = (await frontend.stub.Forward(forward(fakes))).retained
        await frontend.stub.Backward(backward(fakes, name))
    async with start() as frontend:
        calls = (await ready(frontend)).calls
        assert [call[0] for call in calls] == ["retained_forward", "backward"]


async def test_forward_that_expires_behind_a_queued_one_does_not_stand_in_the_way_of_a_replay(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    call = fakes.FakeWorkers._call

    async def slow(self: Any, *what: Any) -> None:
        await asyncio.sleep(0.1)
        await call(self, *what)

    async with start(retained_forwards=1, retained_seconds=0.3) as frontend:
        workers = await frontend.create()
        await frontend.stub.Forward(forward(fakes))
        workers.gate.clear()
        running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"a")))
        await frontend.until(lambda: steps(workers))
        waiting = asyncio.ensure_future(frontend.stub.Forward(forward(fakes)))
        await asyncio.sleep(0.5)
        workers.gate.set()
        await running
        await frontend.stub.Backward(backward(fakes, (await waiting).retained))
    monkeypatch.setattr(fakes.FakeWorkers, "_call", slow)
    # Nor does a replay that takes longer than forwards are retained.
    async with start(retained_forwards=1, retained_seconds=0.05) as frontend:
        calls = [call[0] for call in (await ready(frontend)).calls]
        assert calls[:5] == ["retained_forward", "train_step", "retained_forward", "release", "backward"]


async def test_read_waits_until_what_it_saw_cannot_be_undone_any_more(frontend: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    look = pb.GetStateDictRequest(name="models/m")
    await frontend.create()
    with monkeypatch.context() as patch:
        patch.setattr(SegmentWriter, "write", broken)
        patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
        await frontend.error(frontend.stub.TrainStep(frontend.train(b"a")))
        error = await frontend.error(frontend.stub.GetStateDict(look))
        assert (error.reason, error.outcome) == ("STORAGE_UNREACHABLE", "not_applied")
        assert (await frontend.error(frontend.stub.CreateCheckpoint(save("best")))).reason == "STORAGE_UNREACHABLE"
    assert (await frontend.stub.GetStateDict(look)).step == 1
    await lose_ranks(frontend)
    assert (await frontend.stub.GetStateDict(look)).step == 1


async def test_at_disk_a_named_checkpoint_waits_for_the_fsync_of_what_it_holds(start: Any, monkeypatch: Any) -> None:
    may_sync, sync = threading.Event(), SegmentWriter.sync

    def waits(self: Any) -> None:
        assert may_sync.wait(5)
        sync(self)

    monkeypatch.setattr(SegmentWriter, "sync", waits)
    async with start(durability="disk") as frontend:
        workers = await frontend.create()
        running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"a")))
        await frontend.until(lambda: steps(workers))
        saving = asyncio.ensure_future(frontend.stub.CreateCheckpoint(save("best")))
        await asyncio.sleep(0.2)
        assert not running.done() and not saving.done()
        may_sync.set()
        assert (await saving).step == (await running).result.step == 1


async def test_journal_is_mended_later_while_the_same_checkpoint_is_being_written(start: Any, monkeypatch: Any) -> None:
    write, writing, may_write = CheckpointStore.write, threading.Event(), threading.Event()

    def slow(self: Any, key: str, saved: Any) -> Any:
        if key == "auto/m/1" and not writing.is_set():
            with self._claimed(key):
                writing.set()
                assert may_write.wait(5)
        return write(self, key, saved)

    def fails_when_it_is_written(_: Any) -> None:
        assert writing.wait(5)
        broken()

    monkeypatch.setattr(CheckpointStore, "write", slow)
    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    async with start(durability="disk", checkpoint_commands=1) as frontend:
        await frontend.create()
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "sync", fails_when_it_is_written)
            error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"a")))
            assert error.outcome == "unknown"
        error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"b")))
        assert (error.reason, error.retryable) == ("STORAGE_UNREACHABLE", True)
        may_write.set()


async def test_creation_that_cannot_be_undone_has_an_unknown_outcome_and_its_model_can_be_deleted(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    def unreachable(*_: Any) -> None:
        raise Unavailable("no answer", reason="STORAGE_UNREACHABLE")

    async with start() as frontend:
        with monkeypatch.context() as patch:
            patch.setattr(ModelStorage, "open_journal", unreachable)
            patch.setattr(ModelStorage, "delete", unreachable)
            error = await frontend.error(frontend.stub.CreateModel(frontend.creation(request_id=fakes.request_id())))
            assert (error.reason, error.outcome) == ("STORAGE_UNREACHABLE", "unknown")
        assert (await frontend.model()).state == model_pb2.MODEL_STATE_FAILED
        assert (await frontend.error(frontend.stub.CreateModel(frontend.creation()))).reason == "MODEL_EXISTS"
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
        await frontend.create()


async def test_command_that_kills_its_ranks_is_refused_although_its_record_cannot_be_written_at_first(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    async with start() as frontend:
        await frontend.create()
        frontend.cluster.deadly = b"x"
        monkeypatch.setattr(SegmentWriter, "write", once(SegmentWriter.write))
        request = frontend.train(b"x", request_id=fakes.request_id())
        assert (await frontend.error(frontend.stub.TrainStep(request, timeout=5))).reason == "COMMAND_KILLS_RANKS"
        assert (await frontend.stub.TrainStep(frontend.train(b"a"), timeout=5)).result.step == 1
    async with start() as frontend:
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"


async def test_command_that_kills_its_ranks_is_not_called_refused_for_a_checkpoint_that_was_taken_before(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    async with start() as frontend:
        await frontend.create()
        frontend.cluster.deadly = b"x"
        request = frontend.train(b"x", request_id=fakes.request_id())
        command = pb.GetCommandRequest(name=f"models/m/commands/{request.request_id}")
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "write", once(SegmentWriter.write))
            patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
            assert (await frontend.error(frontend.stub.TrainStep(request))).outcome == "unknown"
            await lose_ranks(frontend)
            assert (await frontend.error(frontend.stub.GetCommand(command))).outcome == "unknown"
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"
    async with start() as frontend:
        assert (await frontend.error(frontend.stub.TrainStep(request))).reason == "COMMAND_KILLS_RANKS"


# --- requests that are remembered ---------------------------------------------------------------------------------


async def test_request_that_runs_is_not_forgotten_however_many_come_and_are_given_up(start: Any, fakes: Any) -> None:
    async with start(stored_replies=1, requests_per_model=4) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        request = frontend.train(b"a", request_id=fakes.request_id())
        first = asyncio.ensure_future(frontend.stub.TrainStep(request))
        await frontend.until(lambda: steps(workers))
        for _ in range(5):
            other = frontend.train(b"x", request_id=fakes.request_id())
            await frontend.error(frontend.stub.TrainStep(other, timeout=0.1))
        again = asyncio.ensure_future(frontend.stub.TrainStep(request))
        await asyncio.sleep(0.1)
        workers.gate.set()
        assert await first == await again
        assert steps(workers) == [(b"a", 1)]


def test_reply_that_is_weighed_again_takes_the_room_once() -> None:
    log: RequestLog[Any] = RequestLog(10, 100)
    first, second = (Call(request_id=each, body=each.encode()) for each in "ab")
    for call in (first, second):
        log.add(call, SimpleNamespace(ended=True, error=None))
    log.weigh(first, 60)
    log.weigh(first, 60)
    log.weigh(second, 40)
    assert log.get("a") is not None and log.get("b") is not None
    log.weigh(second, 41)
    assert log.get("a") is None


def test_reply_of_a_request_that_has_not_ended_is_not_forgotten() -> None:
    log: RequestLog[Any] = RequestLog(10, 100)
    call = Call(request_id="a", body=b"")
    log.add(call, SimpleNamespace(ended=False, error=None))
    log.weigh(call, 200)
    assert log.find(call) is not None


# --- models that come back under difficulties ---------------------------------------------------------------------


async def test_checkpoint_behind_a_damaged_one_is_kept(start: Any, storage: Path) -> None:
    oldest = pb.DeleteCheckpointRequest(name="models/m/checkpoints/0")
    async with start(checkpoint_commands=2) as frontend:
        await frontend.create()
        for value in (b"a", b"b", b"c"):
            await frontend.stub.TrainStep(frontend.train(value))
        (automatic,) = (storage / "checkpoints/auto").glob("*/m")
        damaged = automatic / "2/weights.safetensors"
        await frontend.until(lambda: (automatic / "2/manifest.json").exists())
        await asyncio.sleep(0.1)
        damaged.write_bytes(damaged.read_bytes()[:-1])
        assert steps(await lose_ranks(frontend)) == [(b"a", 1), (b"b", 2), (b"c", 3)]
        assert (await frontend.error(frontend.stub.DeleteCheckpoint(oldest))).reason == "CHECKPOINT_NEEDED"
    async with start() as frontend:
        await ready(frontend)
        assert (await frontend.error(frontend.stub.DeleteCheckpoint(oldest))).reason == "CHECKPOINT_NEEDED"


async def test_model_waits_for_a_storage_that_is_read_only_for_a_while(frontend: Any, monkeypatch: Any) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    with monkeypatch.context() as patch:
        patch.setattr("gradwire_server.storage.local_folders._fetched", read_only)
        old.on_lost(RankLost("rank 0 died"))
        await asyncio.sleep(0.8)
        assert "Read-only" in (await frontend.model()).last_error.message
    assert steps(await ready(frontend)) == [(b"a", 1)]


async def test_model_waits_for_memory_that_a_command_does_not_find_when_it_is_applied_once_more(
    start: Any, fakes: Any, monkeypatch: Any
) -> None:
    async def no_memory(*_: Any) -> None:
        raise ResourceExhausted("a rank is out of memory", reason="OUT_OF_MEMORY")

    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
    async with start(held=True) as frontend:
        with monkeypatch.context() as patch:
            patch.setattr(fakes.FakeWorkers, "_call", no_memory)
            frontend.cluster.gate.set()
            await asyncio.sleep(0.8)
            assert "out of memory" in (await frontend.model()).last_error.message
        assert steps(await ready(frontend)) == [(b"a", 1)]


@pytest.mark.parametrize("deaths", [[b"b"] * 7, [*[b"a"] * 7, *[b"b"] * 7]])
async def test_ranks_that_are_lost_again_and_again_are_replaced_unless_one_command_is_to_blame(
    start: Any, fakes: Any, monkeypatch: Any, deaths: list[bytes]
) -> None:
    call, deadly = fakes.FakeWorkers._call, list(deaths)

    async def dies(self: Any, *what: Any) -> None:
        if deadly and what[1].startswith(deadly[0]):
            deadly.pop(0)
            raise RankLost("killed")
        await call(self, *what)

    monkeypatch.setattr("gradwire_server.restoring.LONGEST_PAUSE", 0.05)
    values = (b"a", b"b", b"c", b"d")
    async with start() as frontend:
        await frontend.create()
        for value in values:
            await frontend.stub.TrainStep(frontend.train(value))
    async with start(held=True) as frontend:
        monkeypatch.setattr(fakes.FakeWorkers, "_call", dies)
        frontend.cluster.gate.set()
        assert [value for value, _ in steps(await ready(frontend))] == list(values)


async def test_ranks_that_are_lost_before_any_command_are_replaced_for_as_long_as_it_takes(frontend: Any) -> None:
    old = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    frontend.cluster.error = RankLost("killed while it started")
    old.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: frontend.cluster.tries == 5)
    frontend.cluster.error = None
    assert steps(await ready(frontend)) == [(b"a", 1)]


async def test_limits_that_are_lower_than_they_were_do_not_keep_a_model_from_coming_back(
    start: Any, fakes: Any
) -> None:
    variant = pb.AddVariantRequest(name="models/m")
    codec.encode_variant(fakes.variant("eval"), variant.variant)
    async with start() as frontend:
        await frontend.create()
        for _ in range(3):
            await frontend.stub.Forward(forward(fakes))
        await frontend.stub.TrainStep(frontend.train(b"a"))
        await frontend.stub.AddVariant(variant)
    async with start(retained_forwards=2, tensor_bytes=4, variants=1, graph_nodes=1) as frontend:
        assert len((await ready(frontend)).retained.kept) == 3


async def test_model_that_has_failed_is_not_said_to_be_lost_and_cannot_be_saved(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
    (manifest,) = storage.glob("checkpoints/auto/*/m/0/manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    async with start() as frontend:
        error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"a")))
        assert error.reason == "MODEL_FAILED" and "restart" in str(error) and "delete" not in str(error)
        assert (await frontend.error(frontend.stub.CreateCheckpoint(save("best")))).reason == "MODEL_FAILED"


# --- while the storage is swept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "process"])
async def test_checkpoints_are_written_and_read_when_what_was_left_over_is_gone(
    start: Any, monkeypatch: Any, durability: str
) -> None:
    sweep, may_sweep = LocalFolders.sweep, threading.Event()

    def waits(self: Any) -> None:
        may_sweep.wait(5)
        time.sleep(0.1)
        sweep(self)

    async with start() as frontend:
        await frontend.create()
        await frontend.stub.CreateCheckpoint(save("best"))
        if durability == "none":
            await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
    monkeypatch.setattr(LocalFolders, "sweep", waits)
    async with start() as frontend:
        if durability == "none":
            await frontend.create("o", durability="none")
            second = pb.CreateCheckpointRequest(parent="models/o", checkpoint_id="second")
            restore = pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="n")
            calls = [frontend.stub.CreateCheckpoint(second), frontend.stub.RestoreModel(restore)]
        else:
            calls = [frontend.stub.CreateCheckpoint(save("second"))]
        waiting = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.2)
        assert not any(call.done() for call in waiting) and not frontend.cluster.tries - (durability == "none")
        may_sweep.set()
        assert [reply.name for reply in await asyncio.gather(*waiting)] == ["checkpoints/second", "models/n"][
            : len(calls)
        ]
