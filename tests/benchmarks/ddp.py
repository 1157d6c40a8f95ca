"""Two ranks beside DistributedDataParallel over gloo on two processes: the medium network, 256 rows together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.benchmark import Benchmark, Setting
from benchmarks.networks import create, medium
from benchmarks.rows import Row
from benchmarks.steps import streamed
from benchmarks.timing import in_turn

import gradwire
from gradwire_proto.values import StepResult

STEPS = 24
IN_FLIGHT = 8
PROCESSES = 2


def measure(setting: Setting) -> Iterator[Row]:
    network = medium()
    with gradwire.launch(workers=PROCESSES, threads_per_rank=1) as client, ddp() as peer:
        model = create(client, network, workers=PROCESSES)
        taken = in_turn(
            setting.rounds,
            {
                "DDP": lambda: peer(STEPS),
                "ranks": lambda: streamed(model, network, IN_FLIGHT, STEPS, seen=of_even_ranks),
            },
        )
    yield Row(
        name=f"{network.name}, {PROCESSES} ranks, train_steps",
        figure=taken.over("DDP", "ranks"),
        unit="x DDP's steps/s over gloo",
        at_least=0.93,
        detail=f"{taken.ms('ranks')} a step, DDP {taken.ms('DDP')}; each rank computed 128 rows",
    )


@contextmanager
def ddp() -> Iterator[Callable[[int], float]]:
    """Seconds of a step of DDP, over so many of them, by processes that torchrun has started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    with subprocess.Popen(
        [*command, "--module", "benchmarks.ddp_peer"],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def run(steps: int) -> float:
            print(steps, file=requests, flush=True)
            return float(answers.readline())

        yield run


def of_even_ranks(result: StepResult) -> None:
    """Whether each rank computed half of the rows."""
    assert result.rank_rows == (128, 128), result.rank_rows


BENCHMARK = Benchmark(measure=measure, rounds=9)

if __name__ == "__main__":
    BENCHMARK.alone()
