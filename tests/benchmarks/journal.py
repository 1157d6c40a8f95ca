"""What the journal costs: steps a second at durability "process" beside "none"."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.benchmark import Benchmark, Setting
from benchmarks.networks import Network, create, medium, small
from benchmarks.rows import Row
from benchmarks.timing import in_turn, mean

import gradwire


def measure(setting: Setting) -> Iterator[Row]:
    for network, steps, bar in ((small(), 400, 10.0), (medium(), 20, 3.0)):
        for ranks in (1, 2):
            yield cost(network, ranks, steps, bar, setting.rounds)


def cost(network: Network, ranks: int, steps: int, bar: float, rounds: int) -> Row:
    """steps: in one stretch. bar: what the journal may cost, in percent."""
    with gradwire.launch(workers=2 * ranks, threads_per_rank=1) as client:
        models = {each: create(client, network, workers=ranks, durability=each) for each in ("none", "process")}
        taken = in_turn(
            rounds,
            {
                durability: lambda model=model: mean(lambda: model.train_step(*network.batch), steps)
                for durability, model in models.items()
            },
        )
    costs = [100 * (1.0 - each) for each in taken.quotients("none", "process")]
    low, _, high = statistics.quantiles(costs, n=4) if rounds > 1 else costs * 3
    return Row(
        name=f"the journal, {network.name}, {ranks} rank{'s' if ranks > 1 else ''}",
        figure=statistics.median(costs),
        unit="% of the steps/s",
        at_most=bar,
        detail=f"{rounds} pairs, quartiles {low:.1f} to {high:.1f} %; a step {taken.ms('process')}",
    )


BENCHMARK = Benchmark(measure=measure, rounds=7)

if __name__ == "__main__":
    BENCHMARK.alone()
