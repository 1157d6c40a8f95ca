"""Processes of a service are killed while it trains: nothing is lost, nothing runs twice, and no bit differs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gradwire
from gradwire import optim

STEPS = 24
KILLED_AT = (7, 15)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def mortal(storage: Path) -> Iterator[gradwire.Client]:
    """A client of a service whose processes may be killed."""
    with gradwire.launch(workers=4, spare_ranks=2, storage=storage, timeout=120) as client:
        yield client


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of different sizes, so that shards are ragged."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 10, generator=generator), torch.randn(rows, 1, generator=generator))
        for rows in (32 + step % 5 for step in range(STEPS))
    ]


def new_model(client: gradwire.Client, name: str) -> gradwire.Model:
    return client.create_model(
        network(),
        loss=nn.MSELoss(),
        optimizer=optim.Adam(lr=0.01),
        example=batches()[0],
        workers=2,
        model_id=name,
    )


def train(model: gradwire.Model, disturb: Callable[[int], None] = lambda _: None) -> list[float]:
    losses = []
    for step, (x, y) in enumerate(batches()):
        disturb(step)
        result = model.train_step(x, y)
        assert result.step == step + 1
        losses.append(result.loss)
    return losses


@pytest.fixture(scope="module")
def undisturbed(mortal: gradwire.Client) -> Iterator[tuple[list[float], gradwire.Model]]:
    """The losses of a run during which nothing happened, and its model."""
    model = new_model(mortal, "calm")
    yield train(model), model


def assert_same(first: gradwire.Model, second: gradwire.Model) -> None:
    """Weights, buffers and optimizer state have the same bits."""

    def check(a: object, b: object, path: str) -> None:
        assert type(a) is type(b), path
        if isinstance(a, torch.Tensor):
            assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), path
        elif isinstance(a, dict):
            assert isinstance(b, dict) and a.keys() == b.keys(), path
            for key in a:
                check(a[key], b[key], f"{path}.{key}")
        elif isinstance(a, list | tuple):
            assert isinstance(b, list | tuple) and len(a) == len(b), path
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                check(x, y, f"{path}[{index}]")
        else:
            assert a == b, path

    check(dict(first.state_dict()), dict(second.state_dict()), "state_dict")
    check(first.optimizer_state_dict(), second.optimizer_state_dict(), "optimizer")


def processes(word: str) -> list[psutil.Process]:
    """The processes of this program's services whose command line has that word, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def ranks_at_work(count: int) -> list[int]:
    """The ranks that have used most of the processor lately."""

    def used(process: psutil.Process) -> float:
        return process.cpu_times().user

    ranks = processes("RankActor")
    before = {rank.pid: used(rank) for rank in ranks}
    time.sleep(0.05)
    return sorted(before, key=lambda pid: -before[pid])[:count]


def kill_soon(pid: int, after: float = 0.002) -> None:
    """Kill a process while the next call is in flight."""
    threading.Timer(after, os.kill, (pid, signal.SIGKILL)).start()


def test_ranks_killed_in_the_middle_of_steps(mortal: gradwire.Client, undisturbed: tuple) -> None:
    losses, calm = undisturbed
    model = new_model(mortal, "ranks")
    recoveries = []

    def disturb(step: int) -> None:
        if step in KILLED_AT:
            # The newest ranks are the spare ones; whichever of the model's own is hit, it has to be replaced.
            for pid in ranks_at_work(1):
                kill_soon(pid)

    assert train(model, disturb) == losses
    assert_same(model, calm)
    assert model.info().state == "ready"
    assert recoveries == []


def test_frontend_killed_in_the_middle_of_training_and_the_same_client_goes_on(
    mortal: gradwire.Client, undisturbed: tuple
) -> None:
    losses, calm = undisturbed
    model = new_model(mortal, "frontend")

    def disturb(step: int) -> None:
        if step in KILLED_AT:
            (frontend,) = processes("gradwire_server.main")
            kill_soon(frontend.pid)

    assert train(model, disturb) == losses
    assert_same(model, calm)


def test_raylet_killed_in_the_middle_of_training(mortal: gradwire.Client, undisturbed: tuple) -> None:
    losses, calm = undisturbed
    model = new_model(mortal, "raylet")

    def disturb(step: int) -> None:
        if step == KILLED_AT[0]:
            (raylet,) = processes("raylet/raylet")
            kill_soon(raylet.pid)

    assert train(model, disturb) == losses
    assert_same(model, calm)
