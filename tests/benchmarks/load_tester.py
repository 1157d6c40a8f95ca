"""What `gradwire load-test` itself costs: requests/s and CPU time of each, beside a bare grpc.aio client in pairs.

Both ask a bare gRPC echo of a small model's gradients; what differs is all that the tester does besides. The bar: at
most 1.5 times the CPU of the bare client.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import grpc

from gradwire.load_test.connections import Connections
from gradwire.load_test.echo import echo_server
from gradwire.load_test.generators import precise_loop
from gradwire.load_test.levels import measure
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.requests import Prepared
from gradwire_proto.v1 import gradient_service_pb2 as pb

SECONDS = 1.0
REQUEST = Prepared("ComputeGradients", bytes(4400))
"""As many bytes as 32 rows of 32 features have."""


def reply() -> bytes:
    """Gradients of 11 kB, as those of 32-64-10."""
    message = pb.ComputeGradientsResponse()
    for name, size in (("0.weight", 8192), ("0.bias", 256), ("2.weight", 2560), ("2.bias", 40)):
        message.gradients.add(name=name).tensor.data = bytes(size)
    return message.SerializeToString()


async def tester(target: str, load: Load) -> tuple[float, float]:
    """(requests/s, CPU seconds of each) of the load tester."""
    async with Connections(target, count=1) as connections:
        options = Options(loads=(load,), warm_up=0.3, window=SECONDS, max_windows=1)
        level = await measure(load, connections, [REQUEST], options, lambda text: None)
        return level.rate, level.tester_cpu / level.rate


async def bare(target: str, load: Load) -> tuple[float, float]:
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
        await asyncio.gather(*(client() for _ in range(int(load.value))))
        return count / SECONDS, (time.process_time() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    arguments = parser.parse_args()
    load = Load("concurrency", arguments.concurrency)
    figures: dict[str, list[tuple[float, float]]] = {"load tester": [], "bare client": []}
    with echo_server(reply()) as target, asyncio.Runner(loop_factory=precise_loop) as runner:
        for _ in range(arguments.pairs):
            figures["load tester"].append(runner.run(tester(target, load)))
            figures["bare client"].append(runner.run(bare(target, load)))
    cpu = {name: statistics.median(each for _, each in found) for name, found in figures.items()}
    for name, found in figures.items():
        rate = statistics.median(each for each, _ in found)
        print(f"{name}: {rate:.0f} requests/s with {load}, {1e6 * cpu[name]:.0f} µs of CPU each")
    print(f"CPU, tester over bare client: {cpu['load tester'] / cpu['bare client']:.2f} (bar: 1.5)")


if __name__ == "__main__":
    main()
