"""Steps that are on their way together give what steps one by one give, bit for bit, whatever dies meanwhile."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from cutting_proxy import CuttingProxy
from torch import nn

import gradwire
from gradwire import optim
from gradwire.errors import InvalidArgument

STEPS = 60
MORTAL = "storage-of-mortal-streams"
"""By this, its service is told from others that tests have launched."""


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Client]:
    """A client of a service whose processes may be killed."""
    with gradwire.launch(workers=4, storage=tmp_path_factory.mktemp(MORTAL), timeout=120) as client:
        yield client


def network(dtype: torch.dtype = torch.float32, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))
    return net.to(dtype)


def batches(count: int = STEPS, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of different sizes, so that shards are ragged."""
    generator = torch.Generator().manual_seed(1)
    rows = [16 + step % 3 for step in range(count)]
    return [
        (torch.randn(each, 10, generator=generator).to(dtype), torch.randn(each, 1, generator=generator).to(dtype))
        for each in rows
    ]


def made(client: gradwire.Client, workers: int, net: nn.Module | None = None) -> gradwire.Model:
    net = net or network()
    example = batches(1, next(net.parameters()).dtype)[0]
    return client.create_model(
        net, loss=nn.MSELoss(), optimizer=optim.Adam(lr=0.01), example=example, workers=workers, seed=3
    )


def one_by_one(client: gradwire.Client, workers: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = made(client, workers)
    losses = [model.train_step(*batch).loss for batch in batches()]
    state = model.state_dict()
    model.delete()
    return losses, state


@pytest.fixture(scope="module")
def calm(mortal: gradwire.Client) -> dict[int, tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and weights of steps that went one by one, by the number of ranks."""
    return {workers: one_by_one(mortal, workers) for workers in (1, 2)}


def assert_same(
    model: gradwire.Model, results: list[gradwire.StepResult], calm: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    assert [result.loss for result in results] == calm[0]
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in calm[1].items())


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_together_are_those_one_by_one(mortal, calm, workers):
    model = made(mortal, workers)
    results = list(model.train_steps(batches(), in_flight=16))
    assert [result.step for result in results] == list(range(1, STEPS + 1))
    assert [sum(result.rank_rows) for result in results] == [len(x) for x, _ in batches()]
    assert all(result.timing.compute > 0 and result.timing.total > 0 for result in results)
    assert_same(model, results, calm[workers])
    model.delete()


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_together_are_those_of_plain_torch(client, workers):
    net = network(torch.float64, dropout=0.0)
    local = copy.deepcopy(net)
    optimizer = torch.optim.Adam(local.parameters(), lr=0.01)
    model = made(client, workers, net)
    for (x, y), result in zip(
        batches(dtype=torch.float64), model.train_steps(batches(dtype=torch.float64)), strict=True
    ):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(local(x), y)
        loss.backward()
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, local.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)


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


def cpu_seconds(process: psutil.Process) -> float:
    """Of all its threads, finer than psutil tells."""
    total = 0
    for each in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # It has ended meanwhile.
            total += int(each.read_text().split()[0])
    return total / 1e9


def train(model: gradwire.Model, disturb: Callable[[int], None]) -> list[gradwire.StepResult]:
    """The results. disturb: called with the number of each, while steps behind it are on their way."""
    results = []
    for result in model.train_steps(batches(), in_flight=16):
        results.append(result)
        disturb(len(results))
    return results


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rank_that_is_killed_in_the_middle(mortal, calm, workers):
    model = made(mortal, workers)

    worked = {each.pid: cpu_seconds(each) for each in processes("RankActor")}

    def disturb(step: int) -> None:
        if step in (17, 38):
            # Those of this model have worked since.
            ranks = sorted(processes("RankActor"), key=lambda each: cpu_seconds(each) - worked.get(each.pid, 0.0))
            threading.Timer(0.001, os.kill, (ranks[-1].pid, signal.SIGKILL)).start()
            worked.update({each.pid: cpu_seconds(each) for each in ranks})

    results = train(model, disturb)
    assert_same(model, results, calm[workers])
    assert any(result.timing.recovery > 0 for result in results)
    model.delete()


@pytest.mark.slow
def test_a_frontend_that_is_killed_in_the_middle(mortal, calm):
    model = made(mortal, 2)

    def disturb(step: int) -> None:
        if step in (13, 40):
            (frontend, *_) = processes("gradwire_server.main_when_ray_is_ready")
            threading.Timer(0.002, os.kill, (frontend.pid, signal.SIGKILL)).start()

    assert_same(model, train(model, disturb), calm[2])
    model.delete()


def test_a_connection_that_is_cut_in_the_middle(mortal, calm):
    proxy = CuttingProxy(mortal.target)
    model = made(mortal, 1)
    cuts = [lambda: setattr(proxy, "up_left", 900), lambda: setattr(proxy, "down_left", 70), proxy.cut]
    with gradwire.connect(proxy.target, timeout=60) as cut:

        def disturb(step: int) -> None:
            if step % 7 == 0:
                cuts[step // 7 % 3]()

        assert_same(model, train(cut.get_model(model.id), disturb), calm[1])
    assert proxy.cuts >= 5
    proxy.close()
    model.delete()


def test_a_refused_step_comes_after_the_results_of_those_before_and_none_behind_is_applied(client):
    net = nn.Linear(3, 4)
    example = torch.randn(6, 3), torch.randint(0, 4, (6,))
    model = client.create_model(net, loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=0.1), example=example)
    bad = example[0], torch.full((6,), 7)
    steps: list[int] = []
    with pytest.raises(InvalidArgument) as caught:
        steps.extend(result.step for result in model.train_steps([example, example, bad, example, example]))
    assert steps == [1, 2] and caught.value.outcome == "not_applied" and caught.value.request_id
    assert model.info().step == 2
    assert model.train_step(*example).step == 3


def test_a_refused_step_on_two_ranks_leaves_them_fit(client):
    net = nn.Linear(3, 4)
    example = torch.randn(6, 3), torch.randint(0, 4, (6,))
    model = client.create_model(
        net, loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=0.1), example=example, workers=2
    )
    # Only the second rank's rows are bad: it fails alone, and the first must not wait for it.
    bad = example[0], torch.tensor([0, 1, 2, 3, 0, 9])
    with pytest.raises(InvalidArgument):
        list(model.train_steps([example, example, bad, example, example]))
    assert [result.step for result in model.train_steps([example] * 3)] == [3, 4, 5]


def test_what_the_batches_raise_comes_after_the_results_of_those_before(client):
    model = made(client, 1)

    def broken() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from batches(5)
        raise OSError("no more data")

    steps: list[int] = []
    with pytest.raises(OSError, match="no more data"):
        steps.extend(result.step for result in model.train_steps(broken()))
    assert steps == [1, 2, 3, 4, 5] and model.info().step == 5


def test_an_iterator_that_is_closed_leaves_what_was_sent_applied(client):
    model = made(client, 1)
    taken = []

    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            taken.append(None)
            yield batches(1)[0]

    results = model.train_steps(endless(), in_flight=4)
    assert [next(results).step for _ in range(3)] == [1, 2, 3]
    results.close()
    # Four answered results wait, and four steps are on their way.
    assert model.info().step == len(taken) <= 3 + 2 * 4


def test_a_step_alone_from_the_body_comes_behind_more_steps_than_the_service_reads_ahead(client):
    model, sent = made(client, 1), []

    def counted() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for each in batches(1) * 600:
            sent.append(None)
            yield each

    results = model.train_steps(counted(), in_flight=500)
    next(results)
    assert len(sent) >= 500
    assert model.train_step(*batches(1)[0]).step == len(sent) + 1
    results.close()


def test_batches_of_other_shapes_and_large_ones_are_steps_as_well(client):
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    model = client.create_model(
        net, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=(torch.randn(4, 8), torch.randn(4, 2))
    )
    twin = client.create_model(
        net, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=(torch.randn(4, 8), torch.randn(4, 2))
    )
    rows = 6 << 17  # 24 MiB of inputs, which travel apart
    mixed = [
        (torch.randn(4, 8), torch.randn(4, 2)),
        (torch.randn(4, 2, 4), torch.randn(4, 2)),
        (torch.randn(rows, 8), torch.randn(rows, 2)),
        (torch.randn(5, 8).numpy(), torch.randn(5, 2).numpy()),
    ]
    results = list(model.train_steps(mixed))
    assert [result.loss for result in results] == [twin.train_step(*batch).loss for batch in mixed]


def test_training_goes_on_over_checkpoints_that_are_taken_meanwhile(mortal: gradwire.Client, tmp_path: Path) -> None:
    model = mortal.create_model(
        network(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.01), example=batches(1)[0], checkpoint_every=10
    )
    assert [result.step for result in model.train_steps(batches(200), in_flight=32)] == list(range(1, 201))
    model.delete()
