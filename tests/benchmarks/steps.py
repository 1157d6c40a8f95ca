"""Steps a second: one by one and in a stream, beside plain torch and a bare grpc.aio echo, in turn, in one run.

Bars, medians: small network (10-5-1, 32 rows), one rank: train_step's p50 at most 2.0 times that of an echo of 1 KiB,
train_steps at least 0.60 of torch's steps a second; medium network (784-1024-1024-10, 256 rows), one rank: train_step
at least 0.93 of torch's, train_steps at least 0.98. One torch thread in each process.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import grpc
import torch
from torch import Tensor, nn

import gradwire
from gradwire import optim

ECHO = "/bare.Echo/Echo"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and its batch. `steps`: in one stretch; `unary`: of them one by one. `in_flight`: of the stream."""

    name: str
    net: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: nn.Module
    steps: int
    unary: int
    in_flight: tuple[int, ...]


def sizes() -> list[Size]:
    """Both."""
    torch.manual_seed(0)
    return [
        Size(
            name="small",
            net=nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)),
            batch=(torch.randn(32, 10), torch.randn(32, 1)),
            loss=nn.MSELoss(),
            steps=1000,
            unary=200,
            in_flight=(8, 32),
        ),
        Size(
            name="medium",
            net=nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
            batch=(torch.randn(256, 784), torch.randint(0, 10, (256,))),
            loss=nn.CrossEntropyLoss(),
            steps=24,
            unary=24,
            in_flight=(8,),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with echo() as target:
        for size in sizes():
            for ranks in options.ranks:
                measure(size, ranks, options.rounds, target)


def measure(size: Size, ranks: int, rounds: int, target: str) -> None:
    with gradwire.launch(workers=ranks, threads_per_rank=1) as client:
        model = client.create_model(
            size.net, loss=size.loss, optimizer=optim.SGD(lr=1e-3), example=size.batch, workers=ranks
        )
        kinds: dict[str, Callable[[], list[float]]] = {
            "torch": lambda: local(size),
            "echo": lambda: asyncio.run(echoes(target, size.unary)),
            "train_step": lambda: one_by_one(model, size),
        }
        for in_flight in size.in_flight:
            kinds[f"train_steps({in_flight})"] = lambda in_flight=in_flight: together(model, size, in_flight)
        for each in kinds.values():
            each()
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, run in kinds.items():
                found[kind].append(statistics.median(run()))
    seconds = {kind: statistics.median(each) for kind, each in found.items()}
    print(f"{size.name}, {ranks} rank{'s' if ranks > 1 else ''}")
    for kind, each in seconds.items():
        ratio = f"{seconds['torch'] / each:5.2f} of torch's steps a second"
        if kind == "train_step":
            ratio += f", {each / seconds['echo']:.2f} echoes"
        print(f"  {kind:16} {each * 1e3:8.3f} ms   {ratio if kind != 'echo' else ''}", flush=True)


def local(size: Size) -> list[float]:
    """Seconds of a step, over stretches of them."""
    net, (inputs, targets) = deepcopy(size.net), size.batch
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss = size.loss(net(inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()

    return timed(step, max(size.steps // 2, 10))


def one_by_one(model: gradwire.Model, size: Size) -> list[float]:
    """Seconds of each."""
    return timed(lambda: model.train_step(*size.batch), size.unary)


def together(model: gradwire.Model, size: Size, in_flight: int) -> list[float]:
    """Seconds of a step, over the whole stretch: from one result to the next they tell little."""
    results = model.train_steps((size.batch for _ in range(size.steps + 2 * in_flight)), in_flight=in_flight)
    for _ in range(in_flight):
        next(results)
    start = time.perf_counter()
    for _ in range(size.steps):
        next(results)
    passed = time.perf_counter() - start
    for _ in results:
        pass
    return [passed / size.steps]


def timed(step: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of so many."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


# --- a bare echo ------------------------------------------------------------------------------------------------------


@contextmanager
def echo() -> Iterator[str]:
    """Where a grpc.aio server in a process of its own answers with what it is sent."""
    command = [sys.executable, __file__, "--serve-echo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


async def serve_echo() -> None:
    async def answer(request: bytes, context: object) -> bytes:
        return request

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


async def echoes(target: str, count: int) -> list[float]:
    """Seconds of each echo of 1 KiB, from a grpc.aio client."""
    payload, seconds = os.urandom(1024), []
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(ECHO)
        for _ in range(20):
            await call(payload)
        for _ in range(count):
            start = time.perf_counter()
            await call(payload)
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve-echo"]:
        asyncio.run(serve_echo())
    else:
        main()
