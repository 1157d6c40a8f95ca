"""Steps a second: one by one and in a stream, beside plain torch and a bare grpc.aio echo of 1 KiB."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice

import grpc
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.local import LocalLoop
from benchmarks.networks import Network, create, medium, small
from benchmarks.rows import Row
from benchmarks.timing import in_turn, mean, once, p50

import gradwire
from gradwire.load_test.echo import echo_server
from gradwire_proto.values import StepResult

ECHO = os.urandom(1024)
IN_FLIGHT = 32


def measure(setting: Setting) -> Iterator[Row]:
    with gradwire.launch(workers=1, threads_per_rank=1) as client:
        yield from of_small(client, setting)
        yield from of_medium(client, setting)


def of_small(client: gradwire.Client, setting: Setting) -> Iterator[Row]:
    network = small()
    local, model = LocalLoop(network, setting.device), create(client, network, device=setting.device)
    with echo_server(ECHO) as target:
        taken = in_turn(
            setting.rounds,
            {
                "local": lambda: mean(lambda: local.step(*network.batch), 500),
                "echo": lambda: asyncio.run(echo_p50(target, 200)),
                "unary": lambda: p50(lambda: model.train_step(*network.batch), 200),
                "stream": lambda: streamed(model, network, IN_FLIGHT, 1000),
            },
        )
    model.delete()
    yield Row(
        name=f"{network.name}, train_step, p50",
        figure=taken.over("unary", "echo"),
        unit="x a bare grpc.aio echo's p50",
        at_most=2.0,
        detail=f"{taken.ms('unary')}, the echo {taken.ms('echo')}",
    )
    yield Row(
        name=f"{network.name}, train_steps",
        figure=taken.over("local", "stream"),
        unit="x local steps/s",
        at_least=0.60,
        detail=f"{taken.ms('stream')} a step with {IN_FLIGHT} in flight, local {taken.ms('local')}",
    )


def of_medium(client: gradwire.Client, setting: Setting) -> Iterator[Row]:
    network = medium()
    local, model = LocalLoop(network, setting.device), create(client, network, device=setting.device)
    calls: dict[str, Callable[[], float]] = {
        "local": lambda: mean(lambda: local.step(*network.batch), 24),
        "train_step": lambda: mean(lambda: model.train_step(*network.batch), 24),
        "train_steps": lambda: streamed(model, network, IN_FLIGHT // 4, 24),
    }
    taken = in_turn(setting.rounds, calls)
    model.delete()
    for kind, bar in (("train_step", 0.93), ("train_steps", 0.98)):
        yield Row(
            name=f"{network.name}, {kind}",
            figure=taken.over("local", kind),
            unit="x local steps/s",
            at_least=bar,
            detail=f"{taken.ms(kind)} a step, local {taken.ms('local')}",
        )


def streamed(
    model: gradwire.Model,
    network: Network,
    in_flight: int,
    steps: int,
    seen: Callable[[StepResult], None] = lambda result: None,
) -> float:
    """Seconds of a step, over the whole stretch: from one result to the next they tell little. seen: is shown each."""
    results = model.train_steps((network.batch for _ in range(steps + 2 * in_flight)), in_flight=in_flight)
    for _ in range(in_flight):
        next(results)
    found: list[StepResult] = []
    seconds = once(lambda: found.extend(islice(results, steps)))
    for result in chain(found, results):
        seen(result)
    return seconds / steps


async def echo_p50(target: str, count: int) -> float:
    """The median seconds of an echo, from a grpc.aio client."""
    seconds = []
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary("/bare.Echo/Echo")
        for _ in range(20):
            await call(ECHO)
        for _ in range(count):
            start = time.perf_counter()
            await call(ECHO)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


BENCHMARK = Benchmark(measure=measure, rounds=9, devices=("cpu", "cuda"))

if __name__ == "__main__":
    BENCHMARK.alone()
