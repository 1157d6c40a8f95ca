"""Fits beside the same loops in plain torch.

The data of small and medium is on the service already; the thermometer's is brought and deleted each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from benchmarks.benchmark import Benchmark, Setting
from benchmarks.local import LocalLoop
from benchmarks.networks import Network, create, medium, small
from benchmarks.rows import Row
from benchmarks.timing import in_turn, once
from torch import Tensor, nn

import gradwire


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fit of `data`, in batches as long as the network's. bar: of local steps/s, or of wall time for one batch."""

    network: Network
    data: tuple[Tensor, Tensor]
    epochs: int
    bar: float
    shuffle: bool = False

    @property
    def batch_size(self) -> int:
        return len(self.network.batch[0])

    @property
    def steps(self) -> int:
        return self.epochs * -(-len(self.data[0]) // self.batch_size)


class Thermometer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, t_u: Tensor) -> Tensor:
        w, b = self.params
        return w * t_u + b


def cases() -> Iterator[Case]:
    network = small()
    data = torch.randn(3200, 10), torch.randn(3200, 1)
    yield Case(network=network, data=data, epochs=60, bar=0.85)
    yield Case(network=network, data=data, epochs=60, bar=0.85, shuffle=True)
    network = medium()
    yield Case(network=network, data=(torch.randn(2560, 784), torch.randint(0, 10, (2560,))), epochs=8, bar=0.97)
    t_u = 0.1 * torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])
    t_c = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
    thermometer = Network(name="thermometer", net=Thermometer(), batch=(t_u, t_c), loss=nn.MSELoss(), lr=1e-2)
    yield Case(network=thermometer, data=(t_u, t_c), epochs=5000, bar=1.5)


def measure(setting: Setting) -> Iterator[Row]:
    with gradwire.launch(workers=1, threads_per_rank=1) as client:
        for case in cases():
            yield compared(case, client, setting)


def compared(case: Case, client: gradwire.Client, setting: Setting) -> Row:
    loop = LocalLoop(case.network, setting.device)
    model = create(client, case.network, device=setting.device)
    stays = len(case.data[0]) > case.batch_size
    data = client.upload_dataset(*case.data) if stays else case.data

    def fit() -> None:
        result = model.fit(data, epochs=case.epochs, batch_size=case.batch_size, shuffle=case.shuffle, progress=False)
        assert result.steps == case.steps

    taken = in_turn(setting.rounds, {"local": lambda: once(lambda: run_local(loop, case)), "fit": lambda: once(fit)})
    model.delete()
    seconds = {name: taken.median(name) for name in taken.seconds}
    detail = ", ".join(f"{name} {1e3 * each / case.steps:.4f} ms a step" for name, each in seconds.items())
    if stays:
        name = f"{case.network.name}, fit" + (", shuffled" if case.shuffle else "")
        figure, unit, bar = taken.over("local", "fit"), "x local steps/s", {"at_least": case.bar}
    else:
        name = f"{case.network.name}, {case.epochs:,} epochs of one batch by fit"
        figure, unit, bar = taken.over("fit", "local"), "x local wall time", {"at_most": case.bar}
    return Row(name=name, figure=figure, unit=unit, detail=detail, **bar)


def run_local(loop: LocalLoop, case: Case) -> list[float]:
    """The same epochs; their losses."""
    x, y = case.data
    losses = []
    for epoch in range(case.epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)) if case.shuffle else None
        for start in range(0, len(x), case.batch_size):
            rows = slice(start, start + case.batch_size)
            chosen = rows if order is None else order[rows]
            losses.append(loop.step(x[chosen], y[chosen]))
    return losses


BENCHMARK = Benchmark(measure=measure, rounds=5, devices=("cpu", "cuda"))

if __name__ == "__main__":
    BENCHMARK.alone()
