"""All gradients of the medium network (7.1 MiB) returned by each call, beside local steps."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.benchmark import Benchmark, Setting
from benchmarks.local import LocalLoop
from benchmarks.networks import create, medium
from benchmarks.rows import Row
from benchmarks.timing import in_turn, once

import gradwire


def measure(setting: Setting) -> Iterator[Row]:
    network = medium()
    with (
        gradwire.launch(workers=1, threads_per_rank=1) as client,
        gradwire.connect(client.target, shared_memory=False) as far_client,
    ):
        local, model = LocalLoop(network, setting.device), create(client, network, device=setting.device)
        far = far_client.get_model(model.id)
        taken = in_turn(
            setting.rounds,
            {
                "local": lambda: once(lambda: local.step(*network.batch)),
                "shared memory": lambda: once(lambda: model.compute_gradients(*network.batch)),
                "TCP": lambda: once(lambda: far.compute_gradients(*network.batch)),
            },
            warm_up=3,
        )
    for way, bar in (("shared memory", 1.10), ("TCP", 1.40)):
        yield Row(
            name=f"{network.name}, all gradients returned, {way}",
            figure=taken.over(way, "local"),
            unit="x local step time",
            at_most=bar,
            detail=f"{taken.ms(way)}, local {taken.ms('local')}",
        )


BENCHMARK = Benchmark(measure=measure, rounds=60, devices=("cpu", "cuda"))

if __name__ == "__main__":
    BENCHMARK.alone()
