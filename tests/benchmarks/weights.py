"""State dicts: 64 MiB down and up beside a bare gRPC stream, and what 1 GiB pulled does to processes' memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.bare_stream import bare_stream
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.rows import Row
from benchmarks.timing import in_turn, once
from chaos.service_processes import frontends
from torch import nn

import gradwire

MIB = 1 << 20
GIB = 1 << 30


class Weights(nn.Module):
    """Little to compute, a lot to carry."""

    def __init__(self, nbytes: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.parts = nn.ParameterList(
            nn.Parameter(torch.zeros(nbytes // parts // 4), requires_grad=False) for _ in range(parts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + sum(part[0] for part in self.parts)


def measure(setting: Setting) -> Iterator[Row]:
    with (
        gradwire.launch(workers=1, threads_per_rank=1, spare_ranks=1) as shared,
        gradwire.connect(shared.target, shared_memory=False) as streamed,
    ):
        # First: memory that a process keeps from other work would hide what this one takes.
        yield from pull(shared, streamed)
        yield from down_and_up(shared, streamed, setting.rounds)


def hosted(client: gradwire.Client, nbytes: int) -> gradwire.Model:
    """A model of that size, which nothing keeps on a disk: what is measured is the way to the rank and back."""
    example = (torch.randn(2, 2), torch.randn(2, 1))
    return client.create_model(Weights(nbytes, 16), loss="mse_loss", example=example, durability="none")


def down_and_up(shared: gradwire.Client, streamed: gradwire.Client, rounds: int) -> Iterator[Row]:
    """64 MiB."""
    size = 64 * MIB
    model = hosted(shared, size)
    far, values = streamed.get_model(model.id), model.state_dict()
    with bare_stream(size) as bare:
        calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "bare": (bare.down, bare.up),
            "TCP": (far.state_dict, lambda: far.load_state_dict(values)),
            "shared": (model.state_dict, lambda: model.load_state_dict(values)),
        }
        taken = in_turn(
            rounds, {way: lambda pair=pair: once(pair[0]) + once(pair[1]) for way, pair in calls.items()}, warm_up=3
        )
    model.delete()
    rates = {way: 2 * size / taken.median(way) / GIB for way in calls}
    yield Row(
        name="64 MiB state dict down and up, TCP",
        figure=taken.over("bare", "TCP"),
        unit="x a bare gRPC stream's throughput",
        at_least=0.85,
        detail=f"{rates['TCP']:.2f} GiB/s, the bare stream {rates['bare']:.2f}",
    )
    yield Row(name="64 MiB state dict down and up, shared memory", figure=rates["shared"], unit="GiB/s", at_least=2.0)


def pull(shared: gradwire.Client, streamed: gradwire.Client) -> Iterator[Row]:
    """1 GiB of weights."""
    model = hosted(shared, GIB)
    (frontend,) = [each.pid for each in frontends()]
    of_frontend, own = {}, {}
    for way, puller in (("shared memory", model), ("TCP", streamed.get_model(model.id))):
        of_frontend[way] = rise(frontend, puller.state_dict)
        own[way] = rise(os.getpid(), puller.state_dict)
    model.delete()
    for whose, rises, bar in (("the frontend's", of_frontend, 64.0), ("the SDK's", own, 1126.4)):
        yield Row(
            name=f"1 GiB of weights pulled, rise of {whose} RssAnon",
            figure=max(rises.values()) / MIB,
            unit="MiB",
            at_most=bar,
            detail=", ".join(f"{way} {value / MIB:.0f}" for way, value in rises.items()),
        )


def rise(pid: int, call: Callable[[], object]) -> int:
    """How many bytes a process's private memory rises while `call` runs, sampled every 10 ms."""
    start, peak, over = private_memory(pid), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, private_memory(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    call()
    over.set()
    thread.join()
    return max(peak, private_memory(pid)) - start


def private_memory(pid: int) -> int:
    """RssAnon of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


BENCHMARK = Benchmark(measure=measure, rounds=30)

if __name__ == "__main__":
    BENCHMARK.alone()
