"""What a killed rank costs, with a warm one in reserve: the stall of the step it hits, and the share of steps kept."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections.abc import Iterator

import psutil
import torch
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.rows import Row
from chaos.report import quantile
from chaos.service_processes import ranks, serving_ranks
from torch import nn

import gradwire
from gradwire import optim

RANKS = 2
SECONDS = 60.0


def measure(setting: Setting) -> Iterator[Row]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
    x, y = torch.randn(64, 784), torch.randint(0, 10, (64,))
    with gradwire.launch(workers=RANKS, spare_ranks=RANKS, threads_per_rank=1) as client:
        model = client.create_model(
            net, loss=nn.CrossEntropyLoss(), optimizer=optim.Adam(lr=1e-3), example=(x, y), workers=RANKS
        )
        for _ in range(200):
            model.train_step(x, y)
        yield from stalls(model, x, y, setting.rounds)
        yield kept(model, x, y)


def stalls(model: gradwire.Model, x: torch.Tensor, y: torch.Tensor, kills: int) -> Iterator[Row]:
    """The step that each kill hits."""
    chosen, found, recoveries = random.Random(0), [], []
    for _ in range(kills):
        _wait_for_a_spare()
        for _ in range(chosen.randrange(20, 60)):
            model.train_step(x, y)
        _kill_one(chosen)
        begin = time.monotonic()
        slow = []
        while time.monotonic() - begin < 0.5 or not slow:
            before = time.monotonic()
            result = model.train_step(x, y)
            if result.timing.recovery:
                slow.append(time.monotonic() - before)
                recoveries.append(result.timing.recovery)
            elif time.monotonic() - begin > 10.0:
                raise AssertionError("the killed rank was not missed")
        found.extend(slow[:1])
    detail = f"{kills} kills; the service's recovery p50 {statistics.median(recoveries):.2f} s"
    for name, share, bar in (("p50", 0.5, 2.0), ("p99", 0.99, 6.0)):
        yield Row(
            name=f"a killed rank with a warm spare, the step that it hits, {name}",
            figure=quantile(found, share),
            unit="s",
            at_most=bar,
            detail=detail,
        )


def kept(model: gradwire.Model, x: torch.Tensor, y: torch.Tensor) -> Row:
    """A minute without a kill, and one with."""
    steps, chosen = {}, random.Random(1)
    for disturbed in (False, True):
        _wait_for_a_spare()
        begin, count, killed = time.monotonic(), 0, not disturbed
        while (passed := time.monotonic() - begin) < SECONDS:
            if not killed and passed > SECONDS / 3:
                _kill_one(chosen)
                killed = True
            model.train_step(x, y)
            count += 1
        steps[disturbed] = count
    return Row(
        name="steps made at one killed rank a minute",
        figure=steps[True] / steps[False],
        unit="of those without",
        at_least=0.85,
        detail=f"{steps[True]} and {steps[False]}",
    )


def _wait_for_a_spare() -> None:
    deadline = time.monotonic() + 60.0
    while len(ranks()) <= RANKS and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)


def _kill_one(chosen: random.Random) -> None:
    victim: psutil.Process = chosen.choice(sorted(serving_ranks(), key=lambda each: each.pid))
    victim.send_signal(signal.SIGKILL)


BENCHMARK = Benchmark(measure=measure, rounds=15)

if __name__ == "__main__":
    BENCHMARK.alone()
