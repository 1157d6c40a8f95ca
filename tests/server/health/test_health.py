"""Whether the service lives and whether it is ready are two questions, and what is missing is said in words."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire_proto.errors import GradwireError, Unavailable
from gradwire_server.health.health_service import Health, HealthPort
from gradwire_server.health.part_watch import PartWatch
from gradwire_server.health.readiness import RAY, STORAGE, Readiness
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.storages import Storages

SERVICE = "gradwire.v1.GradientService"


def stub(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def check(channel: grpc.aio.Channel, name: str = "") -> bool:
    """Whether the health service says that it serves."""
    answer = await stub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_service_that_drains_lives_and_is_not_ready(frontend: Any) -> None:
    names = ("", "live", "ready", SERVICE, "ray", "drain")
    assert [await check(frontend.channel, name) for name in names] == [True] * 6
    watched = stub(frontend.channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
    assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
    await frontend.service.drain()
    assert [await check(frontend.channel, name) for name in names] == [True, True, False, False, True, False]
    assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watched.cancel()


async def test_a_full_service_is_ready(start: Any) -> None:
    async with start(models=1, requests_in_flight=1) as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        call = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))
        await frontend.until(lambda: workers.busy)
        assert (await frontend.error(frontend.stub.TrainStep(frontend.train()))).reason == "TOO_MANY_REQUESTS"
        assert await check(frontend.channel, "ready")
        workers.gate.set()
        await call


async def test_the_plain_port_answers_before_the_service_is_ready_and_has_nothing_else() -> None:
    readiness = Readiness({RAY: "it is not joined yet"})
    port = HealthPort(Health(readiness))
    target = f"127.0.0.1:{await port.start('127.0.0.1:0')}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            assert await check(channel, "live") and not await check(channel, "ready")
            assert dict(readiness()) == {"ray": "it is not joined yet", "storage": None, "drain": None}
            readiness.set(RAY, None)
            assert await check(channel, "ready")
            for method in (f"/{SERVICE}/ListModels", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method)(b"")
                assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    finally:
        await port.stop()


async def test_a_part_that_fails_hangs_and_comes_back_is_told_in_words() -> None:
    readiness, gate = Readiness(), threading.Event()
    answers: list[Any] = [Unavailable("no node is alive"), gate.wait, gate.wait, lambda: None]

    def look() -> None:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, GradwireError):
            raise answer
        answer()

    watch = PartWatch(readiness, RAY, look, "Ray does not answer", every=0.01, patience=0.05)
    watch.start()
    await until(lambda: readiness()[RAY] == "no node is alive")
    await until(lambda: readiness()[RAY] == "Ray does not answer (no answer within 0.05 s)")
    # One look hangs, and no others are begun beside it.
    await asyncio.sleep(0.1)
    assert sum(each.name == "gradwire-health" for each in threading.enumerate()) == 1
    gate.set()
    await until(lambda: readiness.is_ready)
    watch.stop()


async def test_a_look_that_hangs_holds_up_neither_the_loop_nor_the_end() -> None:
    readiness, gate = Readiness(), threading.Event()
    watch = PartWatch(readiness, RAY, gate.wait, "Ray does not answer", every=0.01, patience=0.02)
    began = time.monotonic()
    watch.start()
    await until(lambda: not readiness.is_ready)
    watch.stop()
    assert time.monotonic() - began < 1.0
    gate.set()


def test_a_storage_that_was_taken_over_or_cannot_be_written_to_is_not_ready(tmp_path: Path) -> None:
    lock = StorageLock.take(tmp_path / "storage", 1.0)
    storages = Storages(lock, None)
    storages.check()
    before = sorted(path.name for path in (tmp_path / "storage").iterdir())
    (tmp_path / "storage" / "probe").mkdir()
    with pytest.raises(GradwireError, match=r"storage cannot be written to .*Is a directory"):
        storages.check()
    (tmp_path / "storage" / "probe").rmdir()
    storages.check()
    assert sorted(path.name for path in (tmp_path / "storage").iterdir()) == before
    lock.release()
    StorageLock.take(tmp_path / "storage", 1.0).release()
    with pytest.raises(GradwireError, match="another frontend has taken over the storage") as caught:
        storages.check()
    assert caught.value.reason == "MODEL_FENCED"


def test_parts_are_known_and_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    readiness = Readiness()
    changes: list[bool] = []
    readiness.on_change(lambda: changes.append(readiness.is_ready))
    for why_not in ("disk full", "disk full", None):
        readiness.set(STORAGE, why_not)
    assert changes == [False, True]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "storage: not ready: disk full"
    ]
