"""Gradients that autograd hands out in shared memory, or in a layout of its own, are updated with as torch does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """Both parameters' gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.one + self.other)


class Expanded(nn.Module):
    """The parameter's gradient is one number, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) + self.shift.sum()


class Decay(torch.autograd.Function):
    """The gradient that it gives its weight is the weight that it has saved."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.saved_tensors[0]


class Decayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return Decay.apply(x, self.weight.expand(x.shape[0], 4))[:, :4] + Decay.apply(self.weight, self.weight)


class Alone(nn.Module):
    """The parameter's gradient is what backward() begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.reshape(()) + 0 * x.sum()


def test_what_backward_begins_with_is_not_clipped_with_the_gradients(make_group):
    x, y = torch.randn(4, 2), torch.randn(4)
    group = make_group(Alone(), lambda output, target: output + 0 * target.sum(), (x, y), ranks=1, clip_grad_norm=0.05)
    reports = [group.over_shards("train_step", group.shards(x, y))[0] for _ in range(3)]
    assert [report.grad_norm for report in reports] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("module", [Sum(), Expanded(), Decayed()], ids=lambda module: type(module).__name__)
def test_updates_with_clipping_equal_torch(module, ranks, make_group):
    module = copy.deepcopy(module).double()
    x = torch.randn(5, 4).double()
    y = torch.randn_like(module(x).detach())
    group = make_group(module, nn.MSELoss(), (x, y), ranks=ranks, sgd={"lr": 0.1}, clip_grad_norm=0.05)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        group.train_step(x, y)
        group.zero_grad()
        group.forward_backward(x, y)
        group.optimizer_step()
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x), y).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            optimizer.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(group.state_dict()[name], value, rtol=1e-10, atol=1e-12)


class Stacked(nn.Module):
    """backward() leaves both parameters' gradients in the same memory: parts of one expanded tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.stack([self.one, self.other]).sum(0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_that_torch_leaves_in_one_memory_are_clipped_once(ranks, make_group):
    module = Stacked().double()
    x = torch.randn(6, 4).double()
    y = torch.randn_like(x)
    group = make_group(copy.deepcopy(module), nn.MSELoss(), (x, y), ranks=ranks, sgd={"lr": 0.1}, clip_grad_norm=0.05)
    group.train_step(x, y)
    nn.MSELoss()(module(x), y).backward()
    for each in module.parameters():
        each.grad = each.grad.clone()
    nn.utils.clip_grad_norm_(module.parameters(), 0.05)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    trained = group.state_dict()
    for name, expected in module.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-12, atol=1e-14)
