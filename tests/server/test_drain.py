"""A service that stops ends what it began and says so to everybody else."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire_proto.v1 import gradient_service_pb2 as pb


async def test_draining_refuses_new_requests_and_ends_the_old(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    calls = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(3)]
    await frontend.until(lambda: workers.busy)
    await asyncio.sleep(0.05)
    drain = asyncio.ensure_future(frontend.service.drain())
    await asyncio.sleep(0.05)
    error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
    assert (error.reason, error.retryable, error.outcome) == ("DRAINING", True, "not_applied")
    health = await health_pb2_grpc.HealthStub(frontend.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not drain.done()
    workers.gate.set()
    assert [reply.result.step for reply in await asyncio.gather(*calls)] == [1, 2, 3]
    await asyncio.wait_for(drain, 5)


async def test_draining_waits_for_commands_whose_callers_left(frontend: Any) -> None:
    workers = await frontend.create()
    workers.gate.clear()
    call = frontend.stub.TrainStep(frontend.train())
    await frontend.until(lambda: workers.busy)
    call.cancel()
    await asyncio.sleep(0.05)
    drain = asyncio.ensure_future(frontend.service.drain())
    await asyncio.sleep(0.1)
    assert not drain.done()
    workers.gate.set()
    await asyncio.wait_for(drain, 5)
    assert workers.step == 1


async def test_closing_frees_ranks_and_files(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create()
        await frontend.upload(fakes.two_floats())
        await frontend.stub.GetStateDict(pb.GetStateDictRequest(name="models/m", max_inline_bytes=1))
        assert len(frontend.files) == 2
    assert workers.closed == [True] and not frontend.files


async def test_closing_cuts_what_still_waits(start: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create()
        workers.gate.clear()
        calls = [frontend.stub.TrainStep(frontend.train()) for _ in range(2)]
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.05)
        closing = asyncio.ensure_future(frontend.service.close())
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        workers.gate.set()
        await asyncio.wait_for(closing, 5)
        assert len(workers.calls) == 1
