"""`python tests/benchmarks/fit.py [ROUNDS]`: fits beside the same loops in plain torch, interleaved, as ratios.

Bars: small 0.85 and medium 0.97 of the local steps/s, the thermometer at most 1.5 times the local wall time. Medians
over rounds. The data of small and medium is on the service already; the thermometer's is brought and deleted each time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import gradwire
from gradwire import optim


class Thermometer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, t_u: torch.Tensor) -> torch.Tensor:
        w, b = self.params
        return w * t_u + b


@dataclass(frozen=True, kw_only=True)
class Case:
    """`bar`: of local seconds over a fit's."""

    name: str
    net: nn.Module
    loss: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    batch_size: int
    epochs: int
    lr: float
    bar: float
    shuffle: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * -(-len(self.x) // self.batch_size)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1))
    x, y = torch.randn(3200, 10), torch.randn(3200, 1)
    for shuffle in (False, True):
        name = "small (10-5-1, batch 32)" + (", shuffled" if shuffle else "")
        yield Case(
            name=name,
            net=small,
            loss=nn.MSELoss(),
            x=x,
            y=y,
            batch_size=32,
            epochs=60,
            lr=1e-3,
            bar=0.85,
            shuffle=shuffle,
        )
    layers = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    medium, x, y = nn.Sequential(*layers), torch.randn(2560, 784), torch.randint(0, 10, (2560,))
    yield Case(
        name="medium (784-1024-1024-10, batch 256)",
        net=medium,
        loss=nn.CrossEntropyLoss(),
        x=x,
        y=y,
        batch_size=256,
        epochs=8,
        lr=1e-3,
        bar=0.97,
    )
    t_u = 0.1 * torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])
    t_c = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
    yield Case(
        name="thermometer, 5000 epochs of one batch",
        net=Thermometer(),
        loss=nn.MSELoss(),
        x=t_u,
        y=t_c,
        batch_size=11,
        epochs=5000,
        lr=1e-2,
        bar=1 / 1.5,
    )


def local(case: Case) -> float:
    """Seconds of the loop that everybody writes."""
    optimizer = torch.optim.SGD(case.net.parameters(), lr=case.lr)
    began, losses = time.perf_counter(), []
    for epoch in range(case.epochs):
        if case.shuffle:
            order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(case.x), case.batch_size):
            rows = slice(start, start + case.batch_size) if not case.shuffle else order[start : start + case.batch_size]
            optimizer.zero_grad()
            loss = case.loss(case.net(case.x[rows]), case.y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return time.perf_counter() - began


def remote(case: Case, client: gradwire.Client) -> tuple[gradwire.Model, Callable[[], float]]:
    first = case.x[: case.batch_size], case.y[: case.batch_size]
    given = (case.x, case.y)
    data = client.upload_dataset(*given) if len(case.x) > case.batch_size else given
    model = client.create_model(case.net, loss=case.loss, optimizer=optim.SGD(lr=case.lr), example=first)

    def fit() -> float:
        began = time.perf_counter()
        result = model.fit(data, epochs=case.epochs, batch_size=case.batch_size, shuffle=case.shuffle, progress=False)
        assert result.steps == case.steps
        return time.perf_counter() - began

    return model, fit


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    with gradwire.launch(workers=1, threads_per_rank=1) as client:
        for case in cases():
            model, fit = remote(case, client)
            local(case), fit()
            pairs = [(local(case), fit()) for _ in range(rounds)]
            model.delete()
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            mine, theirs = (statistics.median(column) * 1e3 / case.steps for column in zip(*pairs, strict=True))
            verdict = "met" if ratio >= case.bar else "MISSED"
            words = f"local {mine:8.4f} ms a step, fit {theirs:8.4f}: {ratio:5.2f}x local speed"
            print(f"{case.name:40} {words}, bar {case.bar:.2f}: {verdict}", flush=True)


if __name__ == "__main__":
    main()
