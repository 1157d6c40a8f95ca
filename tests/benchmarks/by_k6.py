"""`gradwire load-test` beside k6 on the same endpoint: as many requests a second, by clients and at a rate."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.rows import Row
from benchmarks.timing import in_turn
from torch import nn

import gradwire
from gradwire.load_test.connections import Connections
from gradwire.load_test.generators import precise_loop
from gradwire.load_test.levels import measure as measure_level
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.subjects import subjects

SCRIPT = Path(__file__).parent.parent / "load" / "k6_gradients.js"
K6 = Path(sys.executable).parent / "k6"
SECONDS = 4.0
ROWS, FEATURES, LAYERS, CLASSES = 32, 8, 200, 10
"""Some ten milliseconds of a rank's time and few bytes, so that it is not the testers that are compared: k6 makes each
message from JSON, and back.
"""

MODEL = "tested"


def measure(setting: Setting) -> Iterator[Row]:
    torch.manual_seed(0)
    hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(FEATURES, FEATURES), nn.Tanh())]
    net = nn.Sequential(*hidden, nn.Linear(FEATURES, CLASSES))
    example = (torch.randn(ROWS, FEATURES), torch.randint(0, CLASSES, (ROWS,)))
    with gradwire.launch(workers=1, threads_per_rank=1, shared_memory=False) as client:
        client.create_model(net, loss="cross_entropy", example=example, workers=1, model_id=MODEL)
        for load in (Load("concurrency", 4), Load("rate", 30)):
            ways: dict[str, Callable[[], float]] = {
                "gradwire load-test": lambda load=load: 1 / ours(client, load),
                "k6": lambda load=load: 1 / theirs(client.target, load),
            }
            taken = in_turn(setting.rounds, ways)
            yield Row(
                name=f"gradwire load-test beside k6, {load}",
                figure=taken.over("k6", "gradwire load-test"),
                unit="x k6's requests/s",
                at_least=0.9,
                at_most=1.1,
                detail=f"{taken.ms('gradwire load-test')} a request, k6 {taken.ms('k6')}",
            )


def ours(client: gradwire.Client, load: Load) -> float:
    """Requests each second."""
    clients = int(load.value) if load.kind == "concurrency" else 1
    options = Options(
        loads=(load,),
        model_ids=(MODEL,),
        batch=ROWS,
        clients=clients,
        warm_up=0.5,
        window=SECONDS / 3,
        max_windows=3,
    )
    with subjects(client, options, print) as chosen:
        requests = [subject.request for subject in chosen]

        async def level() -> float:
            async with Connections(client.target, count=clients) as service:
                found = await measure_level(load, service, requests, options, lambda text: None)
                assert not found.errors
                return found.rate

        with asyncio.Runner(loop_factory=precise_loop) as runner:
            return runner.run(level())


def theirs(target: str, load: Load) -> float:
    """The same by k6."""
    how = "CLIENTS" if load.kind == "concurrency" else "RATE"
    settings = {
        "TARGET": target,
        "MODEL": MODEL,
        "ROWS": ROWS,
        "FEATURES": FEATURES,
        "CLASSES": CLASSES,
        "SECONDS": SECONDS,
        "P95": 10_000,
        how: int(load.value),
    }
    with tempfile.NamedTemporaryFile("r", suffix=".json") as summary:
        subprocess.run(
            [K6, "run", "--quiet", f"--summary-export={summary.name}", *_given(settings), SCRIPT],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        return json.load(summary)["metrics"]["iterations"]["rate"]


def _given(settings: dict[str, object]) -> Iterator[str]:
    for name, value in settings.items():
        yield from ("-e", f"{name}={value}")


BENCHMARK = Benchmark(measure=measure, rounds=3)

if __name__ == "__main__":
    BENCHMARK.alone()
