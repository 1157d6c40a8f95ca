"""Reads of a model whose storage fails, or was taken over: they are answered with what counts, or not at all."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_server.storage.durable_files import replace_file
from gradwire_server.storage.segment_writer import SegmentWriter

READ = pb.GetStateDictRequest(name="models/m")


async def test_what_is_read_or_saved_behind_a_command_that_fails_to_be_durable_was_not_applied(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def sync(_: Any) -> None:
        go.wait(5)
        broken()

    async with start() as frontend:
        await frontend.create(durability="disk")
        commands = frontend.tenant._models._hosted["m"].life.commands
        with monkeypatch.context() as patch:
            patch.setattr(SegmentWriter, "sync", sync)
            patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
            step = asyncio.ensure_future(frontend.error(frontend.stub.TrainStep(frontend.train(b"a"))))
            await frontend.until(lambda: commands.number == 1)
            save = pb.CreateCheckpointRequest(parent="models/m", checkpoint_id="best")
            calls = [frontend.stub.GetStateDict(READ), frontend.stub.CreateCheckpoint(save)]
            waiting = [asyncio.ensure_future(frontend.error(call)) for call in calls]
            await asyncio.sleep(0.1)
            go.set()
            assert [error.outcome for error in await asyncio.gather(*waiting)] == ["not_applied"] * 2
            assert (await step).outcome == "unknown"


async def test_frontend_that_was_taken_over_from_answers_no_reads(frontend: Any, storage: Path) -> None:
    await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    assert (await frontend.stub.GetStateDict(READ)).step == 1
    replace_file(storage / "epoch", b"2\n")
    error = await frontend.error(frontend.stub.GetStateDict(READ))
    assert (error.reason, error.outcome) == ("MODEL_FENCED", "not_applied")
    error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"b")))
    assert (error.reason, error.outcome) == ("MODEL_FENCED", "not_applied")
    assert len([call for call in frontend.cluster.groups["m"].calls if call[0] == "train_step"]) == 1
