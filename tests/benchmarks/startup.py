"""Start-up: launch() to the first gradient, and create_model of a small model on the warm pool, twenty in a row.

The bars on 2 cores: under 12 s, and under 1 s each (the SDK's first export warmed up).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import gradwire
from gradwire import optim


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1))


def create_times(client: gradwire.Client, *, keep: bool, count: int, workers: int) -> list[float]:
    """Seconds of each of `count` create_model calls; the models are deleted between calls, or all kept to the end."""
    example = (torch.randn(32, 10), torch.randn(32, 1))
    seconds, kept = [], []
    for _ in range(count):
        start = time.perf_counter()
        model = client.create_model(
            small(), loss="mse_loss", optimizer=optim.SGD(lr=0.1), example=example, workers=workers
        )
        seconds.append(time.perf_counter() - start)
        if keep:
            kept.append(model)
        else:
            model.delete()
    for model in kept:
        model.delete()
    return seconds


def report(what: str, seconds: list[float]) -> None:
    print(
        f"{what}: median {statistics.median(seconds):.3f} s, mean {statistics.mean(seconds):.3f} s,"
        f" worst {max(seconds):.3f} s, all {sum(seconds):.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="models in a row")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with gradwire.launch(workers=2 * arguments.count) as client:
        launched = time.perf_counter() - start
        gradient = client.grad(lambda x: (x**2).sum())(torch.tensor([2.0, -1.0]))
        first = time.perf_counter() - start
        assert torch.equal(gradient, torch.tensor([4.0, -2.0]))
        print(f"launch() {launched:.2f} s, to the first gradient {first:.2f} s (bar: 12 s)")
        create_times(client, keep=False, count=1, workers=1)
        report(
            "create_model, 1 rank, deleted in between",
            create_times(client, keep=False, count=arguments.count, workers=1),
        )
        report(
            "create_model, 2 ranks, deleted in between",
            create_times(client, keep=False, count=arguments.count, workers=2),
        )
        for workers in (1, 2):
            time.sleep(3)  # what the models before have given back is made ready again
            report(
                f"create_model, {workers} rank{'s' if workers > 1 else ''}, all kept",
                create_times(client, keep=True, count=arguments.count, workers=workers),
            )


if __name__ == "__main__":
    main()
