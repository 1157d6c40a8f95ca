"""Fits on a real service: the bits of train_step and of plain torch, whatever is killed or ended on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from torch import nn

import gradwire
from gradwire import optim
from gradwire.errors import DatasetNotFound, Interrupted, InvalidArgument

MORTAL = "storage-of-the-fitted"
"""By this, its service is told from others that tests have launched."""

ROWS, SIZE, EPOCHS, SEED = 46, 10, 40, 5
STEPS = EPOCHS * 5


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Client]:
    """Of a service whose processes may be killed."""
    with gradwire.launch(workers=4, spare_ranks=2, storage=tmp_path_factory.mktemp(MORTAL), timeout=120) as client:
        yield client


def network(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def examples(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 1, generator=generator)


def orders() -> Iterator[torch.Tensor]:
    """The rows of each step's batch, as the documentation of `fit` says."""
    for epoch in range(EPOCHS):
        yield from torch.randperm(ROWS, generator=torch.Generator().manual_seed(SEED + epoch)).split(SIZE)


def new_model(client: gradwire.Client, net: nn.Module | None = None, **settings: object) -> gradwire.Model:
    x, y = examples()
    return client.create_model(
        net or network(),
        example=(x[:SIZE], y[:SIZE]),
        **{"loss": nn.MSELoss(), "optimizer": optim.Adam(lr=0.01), "workers": 2} | settings,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def one_model_at_a_time(client: gradwire.Client) -> Iterator[None]:
    yield
    for model in client.list_models():
        client.get_model(model.id).delete()


@pytest.fixture(scope="module")
def stepped(client: gradwire.Client) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of one train_step after another on the same batches, and one more."""
    x, y = examples()
    model = new_model(client)
    losses = [model.train_step(x[rows], y[rows]).loss for rows in orders()]
    losses.append(model.train_step(x, y).loss)
    weights = model.state_dict()
    model.delete()
    return losses, weights  # type: ignore[return-value]


def assert_same(model: gradwire.Model, losses: tuple[float, ...], stepped: tuple[list[float], dict]) -> None:
    x, y = examples()
    assert list(losses) == stepped[0][:-1]
    # Its dropout is that of a command which comes after as many others.
    assert model.train_step(x, y).loss == stepped[0][-1]
    assert all(torch.equal(tensor, stepped[1][name]) for name, tensor in model.state_dict().items())


def fit(model: gradwire.Model, callback: Callable[[gradwire.FitStatus], object] | None = None) -> gradwire.FitResult:
    callbacks = [] if callback is None else [callback]
    return model.fit(
        examples(), epochs=EPOCHS, batch_size=SIZE, shuffle=True, seed=SEED, callbacks=callbacks, progress=False
    )


def test_fit_has_the_bits_of_train_steps_and_leaves_no_dataset(client, stepped):
    model = new_model(client)
    heard: list[float] = []
    result = fit(model, lambda status: heard.extend(status.losses))
    assert (result.steps, result.step, result.epochs, result.stopped) == (STEPS, STEPS, EPOCHS, False)
    assert tuple(heard) == result.losses
    assert_same(model, result.losses, stepped)
    assert client.list_datasets() == []


def processes(word: str) -> list[psutil.Process]:
    """The processes of the service whose command line has that word."""
    (service,) = [each for each in psutil.Process().children() if MORTAL in " ".join(each.cmdline())]
    found = []
    for each in service.children(recursive=True):
        try:
            if word in " ".join(each.cmdline()):
                found.append(each)
        except psutil.Error:
            continue
    return sorted(found, key=lambda each: each.create_time())


@pytest.mark.parametrize("word", ["gradwire_server.main", "RankActor"])
def test_fit_goes_on_with_the_same_bits_after_a_kill(client, stepped, word):
    model = new_model(client)
    killed = []

    def kill(status: gradwire.FitStatus) -> None:
        if status.steps > 20 and not killed:
            killed.extend(processes(word))
            for each in killed:
                os.kill(each.pid, signal.SIGKILL)

    result = fit(model, kill)
    assert killed and result.steps == STEPS
    assert_same(model, result.losses, stepped)


def test_fit_is_what_torch_does_and_validates_after_each_epoch(client):
    (x, y), net = examples(), network(dropout=0.0)
    held_out = torch.randn(7, 6, generator=torch.Generator().manual_seed(2)), torch.ones(7, 1)
    model = new_model(client, net, workers=1, optimizer=optim.SGD(lr=0.05, momentum=0.9))
    with_dataset = client.upload_dataset(x, y, dataset_id="mine")
    result = model.fit(with_dataset, epochs=3, batch_size=SIZE, validation=held_out, progress=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses, validated = [], []
    for _ in range(3):
        for rows in torch.arange(ROWS).split(SIZE):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            validated.append(nn.functional.mse_loss(net.eval()(held_out[0]), held_out[1]).item())
        net.train()
    torch.testing.assert_close(result.losses, tuple(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.validation_losses, tuple(validated), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), net.state_dict(), rtol=1e-5, atol=1e-6)
    found = client.get_dataset("mine")
    assert (len(found), found.nbytes) == (ROWS, ROWS * 7 * 4)
    assert [each.id for each in client.list_datasets()] == ["mine"]
    found.delete()
    with pytest.raises(DatasetNotFound):
        client.get_dataset("mine")


def test_callback_and_interrupt_end_a_fit_and_every_step_is_accounted_for(client):
    model = new_model(client, workers=1)
    data = client.upload_dataset(*examples())

    def enough(status: gradwire.FitStatus) -> bool:
        return status.steps < 10

    result = model.fit(data, epochs=1_000_000, batch_size=SIZE, callbacks=[enough], progress=False)
    assert result.stopped and 10 <= result.steps == result.step == model.info().step

    def interrupt(status: gradwire.FitStatus) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"interrupted: (\d+) of 5000000 steps were applied") as caught:
        model.fit(data, epochs=1_000_000, batch_size=SIZE, callbacks=[interrupt], progress=False)
    counted = int(str(caught.value).split()[1])
    assert caught.value.outcome == "applied"
    assert model.info().step == result.step + counted

    def fail(status: gradwire.FitStatus) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.fit(examples(), epochs=1_000_000, batch_size=SIZE, callbacks=[fail], progress=False)
    assert [each.id for each in client.list_datasets()] == [data.id]
    data.delete()


def test_step_that_is_refused_ends_the_fit_where_it_is(client):
    (x, y), model = examples(), new_model(client, on_nan="refuse")
    y[2 * SIZE] = float("nan")
    with pytest.raises(InvalidArgument, match=r"epoch 0, batch 2 .* the 2 steps before it were applied") as caught:
        model.fit((x, y), epochs=2, batch_size=SIZE, progress=False)
    assert (caught.value.reason, caught.value.outcome) == ("LOSS_NOT_FINITE", "applied")
    assert model.info().step == 2
    # The ranks are as good as before.
    assert model.fit((x[:SIZE], y[:SIZE]), epochs=2, progress=False).step == 4


class Thermometer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, t_u: torch.Tensor) -> torch.Tensor:
        w, b = self.params
        return w * t_u + b


def test_thermometer_is_trained_for_five_thousand_epochs(client):
    t_u = 0.1 * torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])
    t_c = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
    model = client.create_model(
        Thermometer(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=1e-2), example=(t_u, t_c), workers=1
    )
    result = model.fit((t_u, t_c), epochs=5000, progress=False)
    for epoch, loss in {500: 7.860116, 1000: 3.828538, 2500: 2.933134, 5000: 2.927647}.items():
        assert result.losses[epoch - 1] == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(model.state_dict()["params"], torch.tensor([5.3671, -17.3012]), atol=1e-3, rtol=0)
