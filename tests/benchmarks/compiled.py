"""Steps of one rank on compiled kernels, beside the same steps eagerly; and how long compiling takes.

Steps come in a stream. The third network's time goes into many operators on each element.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.networks import Network, create, medium, small
from benchmarks.rows import Row
from benchmarks.timing import in_turn
from torch import Tensor, nn

import gradwire

PATIENCE = 900.0
"""Seconds that compiling may take on a machine that does much else."""


class Gated(nn.Module):
    """A convolution, batch norm, and what makes many passes over memory."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x))
        return nn.functional.gelu(x) * torch.sigmoid(x) + torch.tanh(x) * 0.1


def gated() -> Network:
    """Two of them."""
    torch.manual_seed(0)
    return Network(
        name="gated convolutions (3-16-16 channels, 16 x 16, batch 16)",
        net=nn.Sequential(Gated(3, 16), Gated(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        batch=(torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))),
        loss=nn.CrossEntropyLoss(),
    )


def measure(setting: Setting) -> Iterator[Row]:
    for network, steps in ((small(), 1000), (medium(), 24), (gated(), 100)):
        with gradwire.launch(workers=2, threads_per_rank=1) as client:
            yield of(client, network, steps, setting)


def of(client: gradwire.Client, network: Network, steps: int, setting: Setting) -> Row:
    eager = create(client, network, device=setting.device)
    compiled = create(client, network, device=setting.device, compile=True)
    seconds = until_compiled(compiled, network)
    taken = in_turn(
        setting.rounds,
        {"eager": lambda: streamed(eager, network, steps), "compiled": lambda: streamed(compiled, network, steps)},
    )
    return Row(
        name=f"{network.name}, train_steps, compile=True",
        figure=taken.over("eager", "compiled"),
        unit="x eager steps/s",
        detail=f"{taken.ms('compiled')} a step, eager {taken.ms('eager')}; compiled in {seconds:.0f} s",
    )


def until_compiled(model: gradwire.Model, network: Network) -> float:
    """Seconds from the first step until steps run on kernels."""
    start = time.perf_counter()
    while not (told := model.info().compiled) or told[0].state == "compiling":
        model.train_step(*network.batch)
        time.sleep(0.05)
        if time.perf_counter() - start > PATIENCE:
            raise TimeoutError(f"nothing was compiled within {PATIENCE:.0f} s")
    if told[0].state != "in_use":
        raise RuntimeError(f"nothing was compiled: {told[0].reason}")
    return time.perf_counter() - start


def streamed(model: gradwire.Model, network: Network, steps: int) -> float:
    """Seconds of a step, over a stretch of them."""
    start = time.perf_counter()
    for _ in model.train_steps(network.batch for _ in range(steps)):
        pass
    return (time.perf_counter() - start) / steps


BENCHMARK = Benchmark(measure=measure, rounds=5, devices=("cpu", "cuda"))

if __name__ == "__main__":
    BENCHMARK.alone()
