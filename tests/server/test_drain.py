"""A service that stops ends what it began and says so to everybody else."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_server.stopping import Grace, stop_in_order


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
    request = health_pb2.HealthCheckRequest(service="ready")
    stub: Any = health_pb2_grpc.HealthStub(frontend.channel)
    health = await stub.Check(request)
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


async def test_models_that_changed_are_saved_at_the_end_and_others_are_not(frontend: Any) -> None:
    for model_id in ("changed", "new"):
        await frontend.create(model_id)
    for _ in range(3):
        await frontend.stub.TrainStep(frontend.train(model_id="changed"))
    await frontend.service.drain()
    store = frontend.tenant._storage.checkpoints
    assert (store.automatic("changed"), store.automatic("new")) == ([0], [0])
    await frontend.service.save_changed()
    assert (sorted(store.automatic("changed")), store.automatic("new")) == ([0, 3], [0])


class Stubborn:
    """A service whose parts take as long as they are told."""

    def __init__(self, drains: float, saves: float) -> None:
        self.did: list[str] = []
        self._drains, self._saves = drains, saves

    async def drain(self) -> None:
        await asyncio.sleep(self._drains)
        self.did.append("drained")

    async def save_changed(self) -> None:
        await asyncio.sleep(self._saves)
        self.did.append("saved")


@pytest.mark.parametrize(
    ("drains", "saves", "drain_seconds", "grace", "did", "seconds"),
    [
        (0.0, 0.0, 9.0, 9.0, ["drained", "saved"], 0.0),
        # What drains for too long is cut, and what there is is saved.
        (60.0, 0.0, 0.2, 9.0, ["saved"], 0.2),
        # Three quarters of the grace are for all that comes before closing, whatever the drain may take by itself.
        (60.0, 60.0, 60.0, 2.0, [], 1.5),
        (0.4, 60.0, 60.0, 2.0, ["drained"], 1.5),
    ],
)
async def test_a_stop_keeps_within_its_grace(
    drains: float, saves: float, drain_seconds: float, grace: float, did: list[str], seconds: float
) -> None:
    service, left = Stubborn(drains, saves), Grace(grace)
    began = time.monotonic()
    await stop_in_order(service, left, asyncio.Event().wait(), drain_seconds=drain_seconds, saves=True)
    assert service.did == did and seconds <= time.monotonic() - began < seconds + 0.4
    assert left.closing(10.0) <= max(1.0, grace - seconds)


async def test_a_second_signal_cuts_the_rest_short() -> None:
    service, hurry = Stubborn(0.0, 60.0), asyncio.Event()
    stopping = asyncio.ensure_future(stop_in_order(service, Grace(90.0), hurry.wait(), drain_seconds=30.0, saves=True))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    hurry.set()
    await asyncio.wait_for(stopping, 1.0)
    assert service.did == ["drained"]


async def test_nothing_is_saved_where_that_is_not_wanted() -> None:
    service = Stubborn(0.0, 0.0)
    await stop_in_order(service, Grace(9.0), asyncio.Event().wait(), drain_seconds=1.0, saves=False)
    assert service.did == ["drained"]
