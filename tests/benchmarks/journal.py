"""What the journal costs: steps a second at durability "process" beside "none", in turn, in one run.

Bars: 3% on the medium network (784-1024-1024-10, 256 rows), 10% on the small one (10-5-1, 32 rows).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradwire
from gradwire import optim


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and its batch. `steps`: in one stretch. bar: what the journal may cost, as a share."""

    name: str
    make: Callable[[], nn.Module]
    batch: tuple[Tensor, Tensor]
    loss: nn.Module
    steps: int
    bar: float


def sizes() -> list[Size]:
    """Both."""
    torch.manual_seed(0)
    return [
        Size(
            name="small",
            make=lambda: nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)),
            batch=(torch.randn(32, 10), torch.randn(32, 1)),
            loss=nn.MSELoss(),
            steps=400,
            bar=0.10,
        ),
        Size(
            name="medium",
            make=lambda: nn.Sequential(
                nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
            ),
            batch=(torch.randn(256, 784), torch.randint(0, 10, (256,))),
            loss=nn.CrossEntropyLoss(),
            steps=20,
            bar=0.03,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    for size in sizes():
        for ranks in (1, 2):
            _print_cost(size, ranks, options.rounds)


def _print_cost(size: Size, ranks: int, rounds: int) -> None:
    with gradwire.launch(workers=2 * ranks, threads_per_rank=1) as client:
        models = {
            durability: client.create_model(
                size.make(),
                loss=size.loss,
                optimizer=optim.SGD(lr=1e-3),
                example=size.batch,
                workers=ranks,
                durability=durability,
            )
            for durability in ("none", "process")
        }
        costs = []
        for each in range(rounds + 1):
            order = ("none", "process") if each % 2 else ("process", "none")
            rates = {durability: _rate(models[durability], size) for durability in order}
            if each:  # The first warms up.
                costs.append(1.0 - rates["process"] / rates["none"])
        print(
            f"{size.name}, {ranks} rank{'s' if ranks > 1 else ''}: the journal costs {statistics.median(costs):.1%} of"
            f" the steps a second (bar: {size.bar:.0%}; {rounds} pairs, quartiles {_quartiles(costs)};"
            f" {rates['process']:.0f} steps a second)",
            flush=True,
        )


def _rate(model: gradwire.Model, size: Size) -> float:
    begin = time.perf_counter()
    for _ in range(size.steps):
        model.train_step(*size.batch)
    return size.steps / (time.perf_counter() - begin)


def _quartiles(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.1%} to {high:.1%}"


if __name__ == "__main__":
    main()
