"""Idle cost: four models of two ranks each, against bare Ray with as many idle actors, in CPU seconds per second."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.networks import create, small
from benchmarks.rows import Row

import gradwire

RANKS = 8
SECONDS = 10.0
"""Of one window."""

BARE_RAY = """
import sys, time, ray
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, _temp_dir=sys.argv[2],
         log_to_driver=False, object_store_memory=128 << 20)
@ray.remote(num_cpus=1)
class Idle:
    def ready(self):
        import torch
        return True
actors = [Idle.remote() for _ in range(int(sys.argv[1]))]
ray.get([actor.ready.remote() for actor in actors])
print("ready", flush=True)
sys.stdin.readline()
ray.shutdown()
"""


def descendants_of_this_process(but: int | None) -> list[psutil.Process]:
    """The process trees under this one, without the tree of `but`."""
    roots = [child for child in psutil.Process().children() if child.pid != but]
    return [process for root in roots for process in [root, *root.children(recursive=True)]]


def rate(processes: list[psutil.Process]) -> float:
    """CPU seconds per second of these processes while nothing is asked of them."""

    def used() -> float:
        total = 0.0
        for process in processes:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                pass
        return total

    before, start = used(), time.monotonic()
    time.sleep(SECONDS)
    return (used() - before) / (time.monotonic() - start)


def measure(setting: Setting) -> Iterator[Row]:
    network = small()
    with bare_ray() as bare, gradwire.launch(workers=RANKS) as client:
        models = [create(client, network, workers=2) for _ in range(RANKS // 2)]
        for model in models:
            model.train_step(*network.batch)
        time.sleep(10)  # The warm pool refills.
        ours = descendants_of_this_process(but=bare.pid)
        theirs = [bare, *bare.children(recursive=True)]
        pairs = [(rate(ours), rate(theirs)) for _ in range(setting.rounds)]
    yield Row(
        name="idle, four models of two ranks, beside bare Ray with eight actors",
        figure=100 * statistics.median(service - ray for service, ray in pairs),
        unit="% of a core more",
        at_most=2.0,
        detail="; ".join(f"{100 * service:.2f} and {100 * ray:.2f} %" for service, ray in pairs),
    )


@contextmanager
def bare_ray() -> Iterator[psutil.Process]:
    """Ray with eight actors, in a process of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="gwb-") as folder,
        subprocess.Popen(
            [sys.executable, "-c", BARE_RAY, str(RANKS), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
        ) as bare,
    ):
        assert bare.stdin is not None and bare.stdout is not None
        while (line := bare.stdout.readline()) and "ready" not in line:
            pass
        try:
            yield psutil.Process(bare.pid)
        finally:
            bare.stdin.close()
            bare.wait(30)


BENCHMARK = Benchmark(measure=measure, rounds=3)

if __name__ == "__main__":
    BENCHMARK.alone()
