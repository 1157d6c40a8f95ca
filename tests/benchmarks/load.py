"""64 concurrent clients on 16 small models, by `gradwire load-test`'s own parts, beside its bare gRPC echo."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.benchmark import Benchmark, Setting
from benchmarks.rows import Row

import gradwire
from gradwire.load_test.levels import Level
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.sweep import run_sweep

CLIENTS = 64
MODELS = 16


def measure(setting: Setting) -> Iterator[Row]:
    options = Options(
        loads=(Load("concurrency", CLIENTS),) * setting.rounds,
        models=MODELS,
        workers=1,
        clients=CLIENTS,
        max_windows=4,
        floor=True,
    )
    levels: list[Level] = []
    # Without shared memory, as the load test launches it: one message there, and one back.
    with gradwire.launch(workers=MODELS, threads_per_rank=1, shared_memory=False) as client:
        run_sweep(client, options, found=levels.append, progress=lambda text: None, warn=print)
    what = f"{CLIENTS} clients on {MODELS} small models, compute_gradients"
    rates = [(level.rate, level.floor.rate) for level in levels if level.floor is not None]
    latencies = [(level.latencies_ms["p50"] or 0.0, level.latencies_ms["p99"] or 0.0) for level in levels]
    requests = sum(level.measured.latencies.count for level in levels)
    yield Row(
        name=f"{what}, errors",
        figure=sum(level.errors for level in levels),
        unit="errors",
        at_most=0,
        detail=f"{requests} answers",
    )
    yield Row(
        name=f"{what}, requests/s",
        figure=statistics.median(mine / floor for mine, floor in rates),
        unit="x a bare gRPC echo's requests/s",
        at_least=0.35,
        detail="; ".join(f"{mine:.0f} and {floor:.0f}" for mine, floor in rates),
    )
    yield Row(
        name=f"{what}, p99",
        figure=statistics.median(p99 / p50 for p50, p99 in latencies),
        unit="x p50",
        at_most=10,
        detail="; ".join(f"{p50:.0f} and {p99:.0f} ms" for p50, p99 in latencies),
    )


BENCHMARK = Benchmark(measure=measure, rounds=3)

if __name__ == "__main__":
    BENCHMARK.alone()
