"""Sharding never changes the answer: loss, gradients and weights equal those of plain torch on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import gradwire
from gradwire import optim

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
BATCH_SIZES = (1, 2, 7, 64)
STEPS = 5
SGD = {"lr": 0.05, "momentum": 0.9}


class ConvolutionWithBatchNorm(nn.Module):
    """float[n, 3, 6, 6] -> float[n, 4]

    No bias in front of batch norm: its gradient is zero but for rounding, which nothing can reproduce (float32 torch
    misses float64 torch by 18 times the tolerance there).
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.Tanh(),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Recurrent(nn.Module):
    """float[n, 5, 4] -> float[n, 3]"""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """int64[n, 6] -> logits float[n, 11, 6], one class distribution for each position; embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(0.1 * torch.randn(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool, device=tokens.device).triu(1)
        h = self.encoder(self.embedding(tokens) + self.position, mask=mask, is_causal=True)
        return self.head(h).transpose(1, 2)


class RowMixing(nn.Module):
    """Every row sees the mean of all rows: float[n, 4] -> float[n, 2]"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(h - h.mean(0)))


def random_tokens(rows: int) -> tuple[Tensor, Tensor]:
    """Tokens, and targets of which a third are ignored: ranks get unequal weights, some of them none."""
    targets = torch.randint(11, (rows, 6))
    targets[torch.rand(rows, 6) < 0.35] = -100
    targets[-1, 0] = 3
    return torch.randint(11, (rows, 6)), targets


def of(inputs: tuple[int, ...], targets: tuple[int, ...]) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda rows: (torch.randn(rows, *inputs), torch.randn(rows, *targets))


def of_classes(inputs: tuple[int, ...], classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda rows: (torch.randn(rows, *inputs), torch.randint(classes, (rows,)))


@dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Module]
    loss: nn.Module
    batch: Callable[[int], tuple[Tensor, Tensor]]


CASES = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 2)), nn.MSELoss(), of((10,), (2,))),
    "convolution": Case(
        ConvolutionWithBatchNorm,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), label_smoothing=0.1),
        of_classes((3, 6, 6), 4),
    ),
    "lstm": Case(Recurrent, nn.SmoothL1Loss(), of((5, 4), (3,))),
    "transformer": Case(Transformer, nn.CrossEntropyLoss(), random_tokens),
}


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def assert_equal_within(
    tolerance: float, found: Mapping[str, Tensor], reference: Mapping[str, Tensor], what: str
) -> None:
    """Per tensor |found - reference| <= tolerance * max(|reference|, 1e-3 * |all references|), in Euclidean norm."""
    assert set(found) == set(reference), what
    whole = torch.stack([tensor.double().norm() for tensor in reference.values()]).norm()
    for name, tensor in reference.items():
        difference = (found[name].double() - tensor.double()).norm()
        bound = tolerance * torch.maximum(tensor.double().norm(), 1e-3 * whole)
        assert found[name].dtype == tensor.dtype, f"{what}: {name}"
        assert difference <= bound, f"{what}: {name} differs by {difference:.2e}, more than {bound:.2e}"


class Reference:
    """Plain torch on whole batches in this process, beside the same model on the service."""

    def __init__(self, net: nn.Module, loss: nn.Module, dtype: torch.dtype) -> None:
        self.net, self.loss = copy.deepcopy(net), loss
        self.optimizer, self.tolerance = torch.optim.SGD(self.net.parameters(), **SGD), TOLERANCE[dtype]

    def backward(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.net(x), y)
        loss.backward()
        return loss.item()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None}

    def compare_gradients(self, model: gradwire.Model, x: Tensor, y: Tensor) -> gradwire.GradientResult:
        """Loss and every gradient; nothing moves on either side, buffers included."""
        buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        result = model.compute_gradients(x, y)
        loss = self.backward(x, y)
        assert result.loss == pytest.approx(loss, rel=self.tolerance, abs=self.tolerance)
        assert_equal_within(self.tolerance, result.gradients, self.gradients(), f"gradients of {len(x)} rows")
        for name, buffer in self.net.named_buffers():
            buffer.copy_(buffers[name])
        return result

    def compare_steps(self, model: gradwire.Model, batches: list[tuple[Tensor, Tensor]]) -> list[gradwire.StepResult]:
        """Five updates: each loss, and all weights and buffers afterwards."""
        results = []
        for x, y in batches:
            results.append(model.train_step(x, y))
            loss = self.backward(x, y)
            self.optimizer.step()
            assert results[-1].loss == pytest.approx(loss, rel=self.tolerance, abs=self.tolerance)
        what = f"weights after {len(batches)} steps of {len(batches[0][0])} rows"
        assert_equal_within(self.tolerance, model.state_dict(), self.net.state_dict(), what)
        return results


def rows_of_each_rank(rows: int, ranks: int) -> tuple[int, ...]:
    return tuple(rows // ranks + (rank < rows % ranks) for rank in range(ranks))


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float64), (2, torch.float32), (3, torch.float64)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_works_and_the_sum_is_what_torch_computes_on_the_whole_batch(client, name, ranks, dtype):
    case = CASES[name]
    torch.manual_seed(len(name) + 10 * ranks)
    net, loss = case.net().to(dtype), copy.deepcopy(case.loss).to(dtype)
    reference = Reference(net, loss, dtype)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        x, y = case.batch(rows)
        return cast(x, dtype), cast(y, dtype)

    model = client.create_model(
        net, loss=loss, optimizer=optim.SGD(**SGD), example=batch(4), workers=ranks, require_sharding=True
    )
    for rows in BATCH_SIZES:
        # Momentum goes on from size to size on both sides; weights start anew from the service's.
        reference.net.load_state_dict(model.state_dict())
        batches = [batch(rows) for _ in range(STEPS)]
        result = reference.compare_gradients(model, *batches[0])
        assert tuple(result.rank_rows) == rows_of_each_rank(rows, ranks)
        for step in reference.compare_steps(model, batches):
            assert tuple(step.rank_rows) == rows_of_each_rank(rows, ranks)


def test_model_that_mixes_rows_runs_whole_and_is_exact(client):
    ranks = 3
    torch.manual_seed(ranks)
    dtype, batch = torch.float64, of((4,), (2,))
    net = RowMixing().to(dtype)
    reference = Reference(net, nn.MSELoss(), dtype)
    x, y = (tensor.to(dtype) for tensor in batch(6))
    model = client.create_model(net, loss=nn.MSELoss(), optimizer=optim.SGD(**SGD), example=(x, y), workers=ranks)
    sharding = model.info().sharding
    assert sharding.mode == "whole" and sharding.reason
    for rows in BATCH_SIZES:
        batches = [tuple(tensor.to(dtype) for tensor in batch(rows)) for _ in range(STEPS)]
        result = reference.compare_gradients(model, *batches[0])
        assert tuple(result.rank_rows) == (rows, *[0] * (ranks - 1))
        reference.compare_steps(model, batches)


def test_model_that_mixes_rows_is_refused_where_sharding_is_required(client):
    with pytest.raises(gradwire.errors.GradwireError, match="rows"):
        client.create_model(
            RowMixing(),
            loss=nn.MSELoss(),
            optimizer=optim.SGD(**SGD),
            example=(torch.randn(6, 4), torch.randn(6, 2)),
            workers=2,
            require_sharding=True,
        )


def test_batch_norm_over_one_value_per_channel_is_refused_as_in_torch(client):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    with pytest.raises(ValueError):
        net(x[:1])
    model = client.create_model(net, loss=nn.MSELoss(), optimizer=optim.SGD(**SGD), example=(x, y), workers=2)
    with pytest.raises(gradwire.errors.InvalidArgument):
        model.train_step(x[:1], y[:1])
    # One row a rank is enough: the statistics are the whole batch's.
    assert tuple(model.train_step(x[:2], y[:2]).rank_rows) == (1, 1)


def test_batch_norm_of_each_ranks_own_rows_is_shown_and_one_row_is_too_few_for_a_rank(client):
    net, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (torch.randn(6, 4), torch.randn(6, 3))
    settings = {"optimizer": optim.SGD(**SGD), "workers": 2, "sync_batch_norm": False, "require_sharding": True}
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), **settings)
    info = client.get_model(model.id).info()
    assert not info.sync_batch_norm and info.sharding.mode == "rows"
    assert "sync_batch_norm=False" in info.sharding.reason
    outputs = torch.cat([net(x[:3]), net(x[3:])])
    assert model.train_step(x, y).loss == pytest.approx(nn.functional.mse_loss(outputs, y).item(), rel=1e-5)
    with pytest.raises(gradwire.errors.InvalidArgument, match="sync_batch_norm=False"):
        model.train_step(x[:2], y[:2])


def test_batch_norm_of_each_ranks_own_rows_in_a_module_that_the_service_builds(client):
    layers = [
        {"name": "torch.nn.Linear", "config": {"in_features": 4, "out_features": 3}},
        {"name": "torch.nn.BatchNorm1d", "config": {"num_features": 3}},
    ]
    x, y = torch.randn(7, 4), torch.randn(7, 3)
    settings = {"loss": nn.MSELoss(), "optimizer": optim.SGD(**SGD), "workers": 2, "sync_batch_norm": False}
    model = client.create_model(gradwire.Architecture("torch.nn.Sequential", layers=layers), example=(x, y), **settings)
    assert "sync_batch_norm=False" in model.info().sharding.reason
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    net.load_state_dict(model.state_dict())
    first = net(x[:4])
    expected = {name: each.clone() for name, each in net.named_buffers()}
    loss = nn.functional.mse_loss(torch.cat([first, net(x[4:])]), y)
    assert model.train_step(x, y).loss == pytest.approx(loss.item(), rel=1e-5)
    for name, found in model.state_dict().items():
        if name in expected:
            torch.testing.assert_close(found, expected[name])


class Power(nn.Module):
    """Real numbers of complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((), dtype=torch.float64))

    def forward(self, name: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.weight * (z * z.conj()).real + name.sum()


def test_complex_numbers_may_lie_anywhere_in_a_message(client):
    def value(name: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (z * z.conj()).real.sum() * name.sum()

    net = Power()
    target, z = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.complex128)
    for length in range(1, 9):
        name = torch.ones(length)
        torch.testing.assert_close(client.grad(value, argnums=1)(name, z), torch.func.grad(value, 1)(name, z))
    for length in (1, 2, 5):
        name = torch.ones(length, dtype=torch.uint8)
        model = client.create_model(net, loss="mse", optimizer=optim.SGD(lr=0.1), example=((name, z), target))
        expected = nn.functional.mse_loss(net(name, z), target).item()
        assert model.train_step((name, z), target).loss == pytest.approx(expected, rel=1e-9)
