"""Steps on compiled kernels: the same numbers as torch's, and the same bits whatever happens to the service."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from torch import nn

import gradwire
from gradwire import optim

PLACE = "storage-of-the-compiled"
"""By this, its service is told from others that tests have launched."""

BEFORE, AFTER = 4, 8


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Client]:
    """A client of a service whose processes may be killed."""
    storage = tmp_path_factory.mktemp(PLACE)
    with gradwire.launch(workers=4, spare_ranks=1, storage=storage, timeout=180) as client:
        yield client


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator))
        for _ in range(BEFORE + AFTER)
    ]


def train(
    client: gradwire.Client, name: str, disturb: Callable[[int, float], None] = lambda *_: None
) -> tuple[gradwire.Model, list[float | None]]:
    """A model, and its losses: the first steps eagerly, the others on kernels.

    disturb: called before each of these, with the seconds for which ranks were replaced in those before.
    """
    model = client.create_model(
        network(),
        loss=nn.CrossEntropyLoss(),
        optimizer=optim.Adam(lr=0.01),
        example=batches()[0],
        workers=2,
        model_id=name,
        compile=True,
    )
    first, rest = batches()[:BEFORE], batches()[BEFORE:]
    losses: list[float | None] = [model.train_step(x, y).loss for x, y in first[:-1]]
    until(lambda: model.info().compiled)
    # One that comes while they are compiled is what they are tried with.
    losses.append(model.train_step(*first[-1]).loss)
    until(lambda: model.info().compiled[0].state != "compiling")
    assert [(each.state, each.reason) for each in model.info().compiled] == [("in_use", "")]
    recovered = 0.0
    for step, (x, y) in enumerate(rest):
        disturb(step, recovered)
        result = model.train_step(x, y)
        losses.append(result.loss)
        recovered += result.timing.recovery
    return model, losses


def until(condition: Callable[[], object], seconds: float = 540.0) -> None:
    """Wait for what takes a compiler's time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.1)


def kill(word: str, index: int = 0) -> None:
    """End one of the service's processes whose command line has that word."""
    (service,) = [each for each in psutil.Process().children() if PLACE in " ".join(each.cmdline())]
    found = [each for each in service.children(recursive=True) if word in " ".join(each.cmdline())]
    found[index % len(found)].send_signal(signal.SIGKILL)


@pytest.mark.timeout(600)
def test_kernels_give_torchs_losses_and_the_same_bits_after_a_ranks_death_and_a_restart(
    compiling: gradwire.Client,
) -> None:
    calm, expected = train(compiling, "calm")
    twin = network()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    for found, (x, y) in zip(expected, batches(), strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(twin(x), y)
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(loss.item(), rel=1e-4)

    kept = {name: value.clone() for name, value in calm.state_dict().items()}
    calm.delete()
    recoveries = []

    def disturb(step: int, recovered: float) -> None:
        recoveries.append(recovered)
        if step < AFTER - 2 and not recovered:
            # One of the model's, sooner or later.
            kill("RankActor", step)
        elif step == AFTER - 1:
            kill("gradwire_server.main")

    disturbed, losses = train(compiling, "disturbed", disturb)
    assert losses == expected
    assert recoveries[-1] > 0
    assert [each.state for each in disturbed.info().compiled] == ["in_use"]
    for name, value in kept.items():
        assert torch.equal(value, disturbed.state_dict()[name]), name
