"""Functions that bring their own backward, through a real service: plain torch's numbers on one rank and on two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gradwire import optim


class Square(torch.autograd.Function):
    """Its backward is not its forward's derivative: differentiating the forward would show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 30 * x


class Outer(torch.autograd.Function):
    """Calls another function in its forward, and in its backward differentiates one that calls a third."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return Square.apply(x) * factor

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = torch.tanh(Square.apply(x))
        return torch.autograd.grad(y, x, gradient * ctx.factor)[0], None


class MixesRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


class Clips(torch.autograd.Function):
    """The sum of clipped gradients is not the clipped sum."""

    @staticmethod
    def forward(ctx, weight):
        return weight * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-5000, 5000)


class AddsOne(torch.autograd.Function):
    """Rows that count nothing have a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.kind = kind

    def forward(self, x):
        h = self.norm(self.first(x))
        match self.kind:
            case "own backward":
                h = Square.apply(h)
            case "nested":
                h = Outer.apply(h, 0.5)
            case "mixes rows":
                h = MixesRows.apply(h)
            case "adds":
                h = AddsOne.apply(h)
            case "clips":
                return h @ Clips.apply(self.last.weight).T
        return self.last(h)


def train(net: nn.Module, batches, loss=nn.functional.mse_loss) -> list[float]:
    """The losses of plain torch's SGD, which moves `net`."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), []
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(net(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(
    ("kind", "workers", "mode"),
    [
        ("own backward", 2, "rows"),
        ("nested", 1, "rows"),
        ("nested", 2, "rows"),
        ("mixes rows", 2, "whole"),
        ("adds", 2, "whole"),
        ("clips", 2, "whole"),
    ],
)
def test_five_steps_equal_plain_torchs_split_where_a_backward_keeps_rows_apart_and_adds_up(client, kind, workers, mode):
    torch.manual_seed(workers + len(kind))
    net = Net(kind).double()
    # One of them is for one rank alone where there are two.
    batches = [(torch.randn(rows, 4).double(), torch.randn(rows, 3).double()) for rows in (8, 3, 8, 17, 2)]
    local = copy.deepcopy(net)
    model = client.create_model(
        net,
        loss=nn.MSELoss(),
        optimizer=optim.SGD(lr=0.01, momentum=0.9),
        example=batches[0],
        workers=workers,
    )
    assert workers == 1 or model.info().sharding.mode == mode
    losses = [model.train_step(x, y).loss for x, y in batches]
    assert losses == pytest.approx(train(local, batches), rel=1e-10)
    torch.testing.assert_close(model.state_dict(), local.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_smaller_than_the_ranks_has_the_gradients_of_its_rows_alone(client, workers):
    net = nn.Sequential(nn.Linear(4, 3), Applied(AddsOne), nn.Linear(3, 1)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), workers=workers)
    found = model.compute_gradients(x[:1], y[:1]).gradients
    nn.functional.mse_loss(net(x[:1]), y[:1]).backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in net.named_parameters()})


class Applied(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_in_the_loss_has_its_own_backward(client, workers):
    def loss(outputs, targets):
        return Square.apply(outputs - targets).mean()

    net = nn.Linear(4, 3).double()
    batches = [(torch.randn(rows, 4).double(), torch.randn(rows, 3).double()) for rows in (6, 5, 2, 6, 1)]
    local = copy.deepcopy(net)
    model = client.create_model(
        net, loss=loss, optimizer=optim.SGD(lr=0.01, momentum=0.9), example=batches[0], workers=workers
    )
    losses = [model.train_step(x, y).loss for x, y in batches]
    assert losses == pytest.approx(train(local, batches, loss), rel=1e-10)
    torch.testing.assert_close(model.state_dict(), local.state_dict())


def test_gradients_of_a_plain_function_are_those_of_its_own_backward(client):
    def f(x, w):
        return (Square.apply(x) * w).sum() + Outer.apply(w, 2.0).sum()

    x, w = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for argnums in (0, 1, (0, 1)):
        found = client.grad(f, argnums=argnums)(x.detach(), w.detach())
        wanted = (x, w) if argnums == (0, 1) else ((x, w)[argnums],)
        expected = torch.autograd.grad(f(x, w), wanted)
        torch.testing.assert_close(found if isinstance(found, tuple) else (found,), expected)
