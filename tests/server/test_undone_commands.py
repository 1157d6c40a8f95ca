"""Commands that were applied, not recorded as they should be, and undone: none is called so that may come back."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from gradwire_proto.errors import RankLost
from gradwire_proto.status import from_rpc_error
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.segment_writer import SegmentWriter


def broken(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def steps(workers: Any) -> list[bytes]:
    """The batches that these ranks were trained with."""
    return [call[1].rstrip(b"\0") for call in workers.calls if call[0] == "train_step"]


def breaks_while_written_ahead(number: int, patch: pytest.MonkeyPatch) -> None:
    """The fsync of a command before `number` fails once that one's record is in the file, and has not been appended."""
    written, write_ahead = threading.Event(), Journal.write_ahead

    def sync(_: Any) -> None:
        written.wait(5)
        broken()

    def ahead(self: Journal, entry: Any) -> None:
        write_ahead(self, entry)
        if entry.number == number:
            written.set()
            while self.broken is None:
                time.sleep(0.001)

    patch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    patch.setattr("gradwire_server.model_records.AHEAD_BYTES", 0)
    patch.setattr(SegmentWriter, "sync", sync)
    patch.setattr(Journal, "write_ahead", ahead)
    # Nor is there a checkpoint of them.
    patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)


async def lost_after_failure(frontend: Any, request: Any) -> None:
    """A command, then `request`, neither of them durable; then the ranks are lost, and brought back."""
    life = frontend.tenant._models._hosted["m"].life
    first = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"a")))
    await frontend.until(lambda: life.commands.number == 1)
    error = await frontend.error(frontend.stub.TrainStep(request))
    assert error.outcome == "unknown"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first
    assert from_rpc_error(caught.value, command=True).outcome == "unknown"
    old = frontend.cluster.groups["m"]
    old.on_lost(RankLost("rank 0 died"))
    await frontend.until(lambda: frontend.cluster.groups["m"] is not old)
    await frontend.until(lambda: life.description.info.state == "ready")
    assert steps(frontend.cluster.groups["m"]) == [b"a"]


async def restarted(frontend: Any) -> list[bytes]:
    """What was applied once more when the service was started."""
    life = frontend.tenant._models._hosted["m"].life
    await frontend.until(lambda: life.description.info.state == "ready")
    return steps(frontend.cluster.groups["m"])


def get_command(request: Any) -> Any:
    return pb.GetCommandRequest(name=f"models/m/commands/{request.request_id}")


async def test_command_that_was_undone_although_its_record_was_written_does_not_come_back(
    start: Callable[..., Any], fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as frontend:
        await frontend.create(durability="disk")
        request = frontend.train(b"b", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            breaks_while_written_ahead(2, patch)
            await lost_after_failure(frontend, request)
            command = await frontend.stub.GetCommand(get_command(request))
            assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED
    async with start() as frontend:
        assert await restarted(frontend) == [b"a"]
        assert (await frontend.stub.TrainStep(request)).result.step == 2


async def test_command_whose_record_cannot_be_removed_stays_unknown_until_the_journal_is_mended(
    start: Callable[..., Any], fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as frontend:
        await frontend.create(durability="disk")
        request = frontend.train(b"b", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            breaks_while_written_ahead(2, patch)
            patch.setattr(SegmentWriter, "cut", broken)
            await lost_after_failure(frontend, request)
            error = await frontend.error(frontend.stub.GetCommand(get_command(request)))
            assert (error.reason, error.outcome) == ("STORAGE_UNREACHABLE", "unknown")
        command = await frontend.stub.GetCommand(get_command(request))
        assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED
    async with start() as frontend:
        assert await restarted(frontend) == []
        assert (await frontend.model()).step == 1


async def test_command_whose_record_could_not_be_removed_is_applied_by_a_restart(
    start: Callable[..., Any], fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as frontend:
        await frontend.create(durability="disk")
        request = frontend.train(b"b", request_id=fakes.request_id())
        with monkeypatch.context() as patch:
            breaks_while_written_ahead(2, patch)
            patch.setattr(SegmentWriter, "cut", broken)
            await lost_after_failure(frontend, request)
    async with start() as frontend:
        assert await restarted(frontend) == [b"a", b"b"]
        command = await frontend.stub.GetCommand(get_command(request))
        assert command.state == model_pb2.COMMAND_STATE_APPLIED
