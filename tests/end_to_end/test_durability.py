"""Processes of a service are killed while it trains: nothing is lost, nothing runs twice, and no bit differs."""

from __future__ import annotations

import os
import signal
import threading
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
MORTAL = "storage-of-the-mortal"
"""By this, its service is told from others that tests have launched."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(MORTAL)


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


def train(
    model: gradwire.Model,
    disturb: Callable[[int], None] = lambda _: None,
    recovered: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """The losses. disturb: called before each step; recovered: after it, with the seconds that ranks were replaced."""
    losses = []
    for step, (x, y) in enumerate(batches()):
        disturb(step)
        result = model.train_step(x, y)
        assert result.step == step + 1
        losses.append(result.loss)
        recovered(result.timing.recovery)
    return losses


@pytest.fixture(autouse=True)
def one_model_at_a_time(mortal: gradwire.Client, undisturbed: tuple[list[float], gradwire.Model]) -> Iterator[None]:
    """The ranks are for the undisturbed model, and one more."""
    yield
    for model in mortal.list_models():
        if model.id != "calm":
            mortal.get_model(model.id).delete()


@pytest.fixture(scope="module")
def undisturbed(mortal: gradwire.Client) -> tuple[list[float], gradwire.Model]:
    """The losses of a run during which nothing happened, and its model."""
    model = new_model(mortal, "calm")
    return train(model), model


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
    """The processes of the service that is killed whose command line has that word, the oldest first."""
    (service,) = [each for each in psutil.Process().children() if MORTAL in " ".join(each.cmdline())]
    found = []
    for process in service.children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def kill_soon(pid: int, after: float = 0.002) -> None:
    """Kill a process while the next call is in flight."""
    threading.Timer(after, os.kill, (pid, signal.SIGKILL)).start()


def test_ranks_killed_in_the_middle_of_steps(mortal: gradwire.Client, undisturbed: tuple) -> None:
    losses, calm = undisturbed
    model = new_model(mortal, "ranks")
    recoveries = []

    def disturb(step: int) -> None:
        ranks = processes("RankActor")
        if step == KILLED_AT[0]:
            # All of them: nobody is left who knows the state.
            for rank in ranks:
                kill_soon(rank.pid)
        elif step >= KILLED_AT[1] and not any(recoveries[KILLED_AT[1] :]):
            # One of the model's, sooner or later.
            kill_soon(ranks[step % len(ranks)].pid)

    found = train(model, disturb, recoveries.append)
    assert found == losses
    assert_same(model, calm)
    assert any(recoveries[: KILLED_AT[1]]) and any(recoveries[KILLED_AT[1] :])
    assert model.info().state == "ready"


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


def test_training_loop_of_ones_own_over_killed_ranks(mortal: gradwire.Client) -> None:
    def loop(*, disturbed: bool) -> dict[str, torch.Tensor]:
        model = mortal.create_model(network(), optimizer=optim.SGD(lr=0.05), example=batches()[0][:1], workers=2)
        net, optimizer = model.as_module(), model.as_optimizer()
        for step, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            if disturbed and step == KILLED_AT[1]:
                for rank in processes("RankActor"):
                    kill_soon(rank.pid)
            loss = nn.functional.mse_loss(net(x), y)
            if disturbed and step == KILLED_AT[0]:
                # Between a forward that is retained and its backward.
                for rank in processes("RankActor"):
                    rank.kill()
            loss.backward()
            optimizer.step()
        state = dict(model.state_dict())
        model.delete()
        return state

    first, second = loop(disturbed=False), loop(disturbed=True)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_saved_model_opens_with_plain_safetensors_and_is_restored(
    mortal: gradwire.Client, storage: Path, undisturbed: tuple
) -> None:
    _, calm = undisturbed
    calm.save("best")
    net = network()
    net.load_state_dict(load_file(storage / "checkpoints/named/best/weights.safetensors"), strict=True)
    for name, value in calm.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    again = mortal.restore_model("best", model_id="again")
    x, y = batches()[0]
    assert_same(again, calm)
    net.eval()
    torch.testing.assert_close(again.forward(x), net(x))
    again.train_step(x, y)
    assert again.info().step == STEPS + 1
