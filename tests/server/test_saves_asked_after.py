"""Requests for checkpoints whose answer was lost: GetCommand tells what became of them, as it does of commands."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_server.storage.checkpoint_store import CheckpointStore


def save(name: str, request_id: str) -> Any:
    return pb.CreateCheckpointRequest(parent="models/m", checkpoint_id=name, request_id=request_id)


def asked(request_id: str, *, wait: bool = False) -> Any:
    return pb.GetCommandRequest(name=f"models/m/commands/{request_id}", wait=wait)


async def test_save_that_its_caller_did_not_wait_for_is_known_while_it_runs_and_afterwards(
    start: Callable[..., Any], fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go = CheckpointStore.write, threading.Event()

    def slow(self: CheckpointStore, key: str, saved: Any) -> Any:
        if key.startswith("named/"):
            assert go.wait(5)
        return write(self, key, saved)

    monkeypatch.setattr(CheckpointStore, "write", slow)
    request_id = fakes.request_id()
    async with start() as frontend:
        await frontend.create()
        await frontend.error(frontend.stub.CreateCheckpoint(save("best", request_id), timeout=0.3))
        state = (await frontend.stub.GetCommand(asked(request_id))).state
        assert state == model_pb2.COMMAND_STATE_RUNNING
        waiting = asyncio.ensure_future(frontend.stub.GetCommand(asked(request_id, wait=True)))
        again = asyncio.ensure_future(frontend.stub.CreateCheckpoint(save("best", request_id)))
        await asyncio.sleep(0.05)
        go.set()
        assert (await waiting).state == model_pb2.COMMAND_STATE_APPLIED
        assert (await again).name == "checkpoints/best"
        assert (await frontend.stub.GetCommand(asked(request_id))).state == model_pb2.COMMAND_STATE_APPLIED
    async with start() as frontend:
        answer = await frontend.stub.GetCommand(asked(request_id, wait=True))
        assert answer.state == model_pb2.COMMAND_STATE_APPLIED


async def test_save_that_was_refused_is_known_as_not_applied(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    await frontend.stub.CreateCheckpoint(save("best", fakes.request_id()))
    request_id = fakes.request_id()
    assert (
        await frontend.error(frontend.stub.CreateCheckpoint(save("best", request_id)))
    ).reason == "CHECKPOINT_EXISTS"
    command = await frontend.stub.GetCommand(asked(request_id))
    assert command.state == model_pb2.COMMAND_STATE_NOT_APPLIED and "best" in command.error.message


async def test_save_that_arrives_after_it_was_asked_about_is_refused(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    request_id = fakes.request_id()
    assert (await frontend.error(frontend.stub.GetCommand(asked(request_id)))).reason == "COMMAND_NOT_FOUND"
    error = await frontend.error(frontend.stub.CreateCheckpoint(save("best", request_id)))
    assert (error.reason, error.outcome) == ("DECLARED_NOT_APPLIED", "not_applied")
    names = [each.name for each in (await frontend.stub.ListCheckpoints(pb.ListCheckpointsRequest())).checkpoints]
    assert "checkpoints/best" not in names
