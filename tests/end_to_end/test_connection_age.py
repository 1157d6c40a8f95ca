"""Connections that the service ends at a certain age: no call fails, no step is lost or applied twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import gradwire
from gradwire import optim

AGE = 1.0


@pytest.fixture(scope="module")
def aging() -> Iterator[gradwire.Client]:
    """A client of a service whose connections are old after a second, and cut a second later. All goes by gRPC."""
    options: dict[str, Any] = {"connection_age_seconds": AGE, "connection_age_grace_seconds": 1.0}
    with gradwire.launch(workers=1, spare_ranks=1, shared_memory=False, **options) as client:
        yield client


@pytest.fixture
def model(aging: gradwire.Client) -> Iterator[gradwire.Model]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    model = aging.create_model(net, loss="mse_loss", optimizer=optim.SGD(lr=0.01), example=batch(0))
    yield model
    model.delete()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 64, generator=generator), torch.randn(16, 8, generator=generator)


def connections(client: gradwire.Client) -> set[int]:
    """The ports on this side of connections to the service."""
    port = int(client.target.rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in found if each.raddr and each.raddr.port == port}


def assert_plain_torch_agrees(model: gradwire.Model, losses: list[float | None]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    local = torch.optim.SGD(net.parameters(), lr=0.01)
    for step, loss in enumerate(losses):
        local.zero_grad()
        expected = nn.functional.mse_loss(net(batch(step)[0]), batch(step)[1])
        expected.backward()
        local.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_calls_one_by_one_outlive_their_connections(aging: gradwire.Client, model: gradwire.Model) -> None:
    losses, seen = [], set[int]()
    end = time.monotonic() + 3.5 * AGE
    while time.monotonic() < end:
        result = model.train_step(*batch(len(losses)))
        losses.append(result.loss)
        assert result.step == len(losses)
        model.state_dict()
        seen |= connections(aging)
    assert len(seen) >= 3
    assert_plain_torch_agrees(model, losses)


def test_a_stream_of_steps_outlives_its_connections(aging: gradwire.Client, model: gradwire.Model) -> None:
    seen = set[int]()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        end, step = time.monotonic() + 5 * AGE, 0
        while time.monotonic() < end:
            yield batch(step)
            step += 1
            seen.update(connections(aging))
            time.sleep(0.005)

    results = list(model.train_steps(batches(), in_flight=8))
    assert [each.step for each in results] == list(range(1, len(results) + 1))
    assert len(seen) >= 2
    assert_plain_torch_agrees(model, [each.loss for each in results])


def test_a_fit_outlives_its_connections(aging: gradwire.Client, model: gradwire.Model) -> None:
    x, y = (torch.cat(parts) for parts in zip(*map(batch, range(8)), strict=True))
    seen = set[int]()

    def look(_: gradwire.FitStatus) -> bool:
        seen.update(connections(aging))
        return time.monotonic() < end

    end = time.monotonic() + 5 * AGE
    result = model.fit((x, y), epochs=100_000, batch_size=16, callbacks=[look])
    assert len(seen) >= 2 and len(result.losses) == model.info().step
