"""What `gradwire load-test` itself costs: CPU time of a request, beside a bare grpc.aio client's, in pairs.

Both ask a bare gRPC echo of a small model's gradients; what differs is all that the tester does besides.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

import grpc
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.rows import Row

from gradwire.load_test.connections import Connections
from gradwire.load_test.echo import echo_server
from gradwire.load_test.generators import precise_loop
from gradwire.load_test.levels import measure as measure_level
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.requests import Prepared
from gradwire_proto.v1 import gradient_service_pb2 as pb

SECONDS = 1.0
LOAD = Load("concurrency", 64)
REQUEST = Prepared("ComputeGradients", bytes(4400))
"""As many bytes as 32 rows of 32 features have."""


def measure(setting: Setting) -> Iterator[Row]:
    with echo_server(reply()) as target, asyncio.Runner(loop_factory=precise_loop) as runner:
        pairs = [(runner.run(tester(target)), runner.run(bare(target))) for _ in range(setting.rounds)]
    clients = {"the tester": [mine for mine, _ in pairs], "the bare client": [theirs for _, theirs in pairs]}
    yield Row(
        name=f"the load tester on a bare echo, {LOAD}",
        figure=statistics.median(mine / theirs for (_, mine), (_, theirs) in pairs),
        unit="x a bare grpc.aio client's CPU",
        at_most=1.5,
        detail=", ".join(
            f"{who} {statistics.median(rate for rate, _ in found):.0f} requests/s, "
            f"{1e6 * statistics.median(cpu for _, cpu in found):.0f} µs each"
            for who, found in clients.items()
        ),
    )


def reply() -> bytes:
    """Gradients of 11 kB, as those of 32-64-10."""
    message = pb.ComputeGradientsResponse()
    for name, size in (("0.weight", 8192), ("0.bias", 256), ("2.weight", 2560), ("2.bias", 40)):
        message.gradients.add(name=name).tensor.data = bytes(size)
    return message.SerializeToString()


async def tester(target: str) -> tuple[float, float]:
    """(requests/s, CPU seconds of each) of the load tester."""
    async with Connections(target, count=1) as connections:
        options = Options(loads=(LOAD,), warm_up=0.3, window=SECONDS, max_windows=1)
        level = await measure_level(LOAD, connections, [REQUEST], options, lambda text: None)
        return level.rate, level.tester_cpu / level.rate


async def bare(target: str) -> tuple[float, float]:
    """The same of calls in a loop."""
    count, end = 0, time.monotonic() + SECONDS

    async def client() -> None:
        nonlocal count
        while time.monotonic() < end:
            await method(REQUEST.body, timeout=30)
            count += 1

    async with grpc.aio.insecure_channel(target) as channel:
        method = channel.unary_unary(REQUEST.path)
        await method(REQUEST.body)
        began = time.process_time()
        await asyncio.gather(*(client() for _ in range(int(LOAD.value))))
        return count / SECONDS, (time.process_time() - began) / count


BENCHMARK = Benchmark(measure=measure, rounds=5)

if __name__ == "__main__":
    BENCHMARK.alone()
