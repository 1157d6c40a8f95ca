"""Steps a second of one rank, eagerly and on compiled kernels, in turn, in one run; and how long compiling takes.

Steps come in a stream. Networks: small (10-5-1, 32 rows), medium (784-1024-1024-10, 256 rows), and one whose time goes
into many operators on each element (convolutions with batch norm, GELU and gates between them, 16 rows). One torch
thread in each process.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradwire
from gradwire import optim

PATIENCE = 900.0
"""Seconds that compiling may take on a machine that does much else."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and its batch. `steps`: in one stretch."""

    name: str
    net: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: nn.Module
    steps: int


class Gated(nn.Module):
    """A convolution, batch norm, and what makes many passes over memory."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x))
        return nn.functional.gelu(x) * torch.sigmoid(x) + torch.tanh(x) * 0.1


def sizes() -> list[Size]:
    """All three."""
    torch.manual_seed(0)
    return [
        Size(
            name="small",
            net=nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)),
            batch=(torch.randn(32, 10), torch.randn(32, 1)),
            loss=nn.MSELoss(),
            steps=1000,
        ),
        Size(
            name="medium",
            net=nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
            batch=(torch.randn(256, 784), torch.randint(0, 10, (256,))),
            loss=nn.CrossEntropyLoss(),
            steps=24,
        ),
        Size(
            name="elementwise",
            net=nn.Sequential(Gated(3, 16), Gated(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
            batch=(torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))),
            loss=nn.CrossEntropyLoss(),
            steps=100,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for size in sizes():
        measure(size, options.rounds)


def measure(size: Size, rounds: int) -> None:
    with gradwire.launch(workers=2, threads_per_rank=1) as client:
        models = {
            kind: client.create_model(
                size.net, loss=size.loss, optimizer=optim.SGD(lr=1e-3), example=size.batch, compile=kind == "compiled"
            )
            for kind in ("eager", "compiled")
        }
        took = compiled(models["compiled"], size)
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in models}
        for _ in range(rounds):
            for kind, model in models.items():
                found[kind].append(stretch(model, size))
    print(f"{size.name}, compiled in {took:.1f} s")
    seconds = {kind: [statistics.median(part) for part in zip(*each, strict=True)] for kind, each in found.items()}
    for kind, (step, computed) in seconds.items():
        ratios = seconds["eager"][0] / step, seconds["eager"][1] / computed
        print(
            f"  {kind:9} {step * 1e3:8.3f} ms a step, {computed * 1e3:8.3f} of it forward and backward"
            f"   {ratios[0]:5.2f} and {ratios[1]:5.2f} of eager's speed",
            flush=True,
        )


def compiled(model: gradwire.Model, size: Size) -> float:
    """Seconds from the first step until steps run on kernels."""
    start = time.perf_counter()
    while not (told := model.info().compiled) or told[0].state == "compiling":
        model.train_step(*size.batch)
        time.sleep(0.05)
        if time.perf_counter() - start > PATIENCE:
            raise TimeoutError(f"nothing was compiled within {PATIENCE:.0f} s")
    if told[0].state != "in_use":
        raise RuntimeError(f"nothing was compiled: {told[0].reason}")
    return time.perf_counter() - start


def stretch(model: gradwire.Model, size: Size) -> tuple[float, float]:
    """Seconds of a step, and of its forward and backward, over a stretch of them."""
    start = time.perf_counter()
    computed = [each.timing.compute for each in model.train_steps(size.batch for _ in range(size.steps))]
    return (time.perf_counter() - start) / size.steps, statistics.median(computed)


if __name__ == "__main__":
    main()
