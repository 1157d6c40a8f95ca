"""What a call takes besides computing: against the bytes that travel, and against parameters that do not.

Overhead is what the client waits for a train_step, less forward, backward and update. Freeing the gradients counts as
the update's, not as overhead: a local loop's zero_grad() takes that time too. The first curve is of batches from 1 KiB
to 256 MiB, the second of networks from 10^3 to 10^8 parameters that are given two rows of ten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from math import isqrt

import torch
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.networks import Network, create
from benchmarks.rows import Row
from benchmarks.timing import in_turn
from torch import nn

import gradwire

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAYLOADS = [KIB << shift for shift in range(0, 19, 2)]
PARAMETERS = [10**power for power in range(3, 9)]
FLAT = 2.0
"""How much more a call may take at 10^8 parameters than at 10^3 for "flat": caches are colder there."""


def measure(setting: Setting) -> Iterator[Row]:
    with (
        gradwire.launch(workers=len(PARAMETERS), threads_per_rank=1) as shared,
        gradwire.connect(shared.target, shared_memory=False) as streamed,
    ):
        yield from against_payload(shared, streamed, setting.rounds)
        yield against_parameters(shared, setting.rounds)


def against_payload(shared: gradwire.Client, streamed: gradwire.Client, rounds: int) -> Iterator[Row]:
    batches = {size: rows_of_a_kib(size // KIB) for size in PAYLOADS}
    network = Network(name="sum", net=nn.Linear(256, 1), batch=batches[16 * KIB], loss=nn.MSELoss())
    # Nothing is kept on a disk: what is measured is the way to the rank.
    model = create(shared, network, durability="none")
    for way, way_model in (("TCP", streamed.get_model(model.id)), ("shared memory", model)):
        taken = in_turn(
            rounds,
            {
                str(size): lambda size=size, it=way_model: overhead(it, batches[size], calls=10 if size < MIB else 2)
                for size in PAYLOADS
            },
        )
        curve = {size: taken.median(str(size)) for size in PAYLOADS}
        slope, _ = statistics.linear_regression(list(curve), list(curve.values()))
        yield Row(
            name=f"overhead of a call against its payload, 1 KiB to 256 MiB, {way}",
            figure=statistics.correlation(list(curve), list(curve.values())) ** 2,
            unit="r² of a line",
            at_least=0.99,
            detail=f"its slope is {1 / slope / GIB:.2f} GiB/s\n" + text(curve, "payload, KiB", KIB),
        )
    model.delete()


def rows_of_a_kib(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets are 0.4% more."""
    return torch.randn(rows, 256), torch.randn(rows, 1)


def against_parameters(client: gradwire.Client, rounds: int) -> Row:
    networks = {count: perceptron(count) for count in PARAMETERS}
    models = {count: create(client, network, durability="none") for count, network in networks.items()}
    taken = in_turn(
        rounds,
        {
            str(count): lambda count=count, it=model: overhead(it, networks[count].batch, calls=5)
            for count, model in models.items()
        },
    )
    for model in models.values():
        model.delete()
    return Row(
        name="overhead of a call at 10^8 parameters that do not travel",
        figure=taken.over(str(PARAMETERS[-1]), str(PARAMETERS[0])),
        unit="x that at 10^3",
        at_most=FLAT,
        detail="a train_step of two rows; freeing its gradients counts as the update's\n"
        + text({count: taken.median(str(count)) for count in PARAMETERS}, "parameters", 1),
    )


def perceptron(parameters: int) -> Network:
    """So many of them, nearly all in the layer in the middle."""
    width = isqrt(parameters)
    return Network(
        name=f"{parameters} parameters",
        net=nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)),
        batch=(torch.randn(2, 10), torch.randn(2, 1)),
        loss=nn.MSELoss(),
    )


def overhead(model: gradwire.Model, batch: tuple[torch.Tensor, torch.Tensor], calls: int) -> float:
    """The median seconds of a call that were spent on neither forward, backward nor update."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        timing = model.train_step(*batch).timing
        seconds.append(time.perf_counter() - start - timing.compute - timing.optimizer)
    return statistics.median(seconds)


def text(curve: Mapping[int, float], what: str, unit: int) -> str:
    """Two columns."""
    lines = [f"{what:>14}  {'overhead, ms':>12}"]
    return "\n".join([*lines, *(f"{x // unit:14,}  {1e3 * seconds:12.2f}" for x, seconds in curve.items())])


BENCHMARK = Benchmark(measure=measure, rounds=5)

if __name__ == "__main__":
    BENCHMARK.alone()
