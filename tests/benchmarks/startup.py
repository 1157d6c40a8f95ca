"""Start-up: launch() to the first gradient, and create_model of a small model, twenty in a row.

Deleted in between they use the warm pool's ranks again; all kept they soon need more ranks than it has ready.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.networks import create, small
from benchmarks.rows import Row
from benchmarks.timing import once

import gradwire

MODELS = 20


def measure(setting: Setting) -> Iterator[Row]:
    yield to_the_first_gradient(setting.rounds)
    with gradwire.launch(workers=2 * MODELS) as client:
        create_times(client, workers=1, keep=False, count=1)  # The SDK's first export.
        for keep in (False, True):
            for workers in (1, 2):
                time.sleep(3)  # What the models before have given back is made ready again.
                yield created(client, workers=workers, keep=keep)


def to_the_first_gradient(rounds: int) -> Row:
    launched, first = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with gradwire.launch(workers=2) as client:
            launched.append(time.perf_counter() - start)
            gradient = client.grad(lambda x: (x**2).sum())(torch.tensor([2.0, -1.0]))
            first.append(time.perf_counter() - start)
            assert torch.equal(gradient, torch.tensor([4.0, -2.0]))
    return Row(
        name="launch() to the first gradient",
        figure=statistics.median(first),
        unit="s",
        at_most=8.0,
        detail=f"worst {max(first):.2f} s of {rounds}; launch() itself {statistics.median(launched):.2f} s",
    )


def created(client: gradwire.Client, *, workers: int, keep: bool) -> Row:
    seconds = create_times(client, workers=workers, keep=keep, count=MODELS)
    ranks = f"{workers} rank{'s' if workers > 1 else ''}"
    return Row(
        name=f"create_model, {ranks}, {MODELS} in a row, all kept"
        if keep
        else f"create_model on the warm pool, {ranks}",
        figure=statistics.median(seconds),
        unit="s",
        at_most=1.0 if keep else 0.5,
        detail=f"mean {statistics.mean(seconds):.3f} s, worst {max(seconds):.3f} s",
    )


def create_times(client: gradwire.Client, *, workers: int, keep: bool, count: int) -> list[float]:
    """Seconds of each of `count` create_model calls; the models are deleted between calls, or all kept to the end."""
    network, kept = small(), []
    seconds = []
    for _ in range(count):
        seconds.append(once(lambda: kept.append(create(client, network, workers=workers))))
        if not keep:
            kept.pop().delete()
    for model in kept:
        model.delete()
    return seconds


BENCHMARK = Benchmark(measure=measure, rounds=3)

if __name__ == "__main__":
    BENCHMARK.alone()
