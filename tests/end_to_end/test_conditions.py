"""torch.cond: the branch that the batch chooses, with its gradients, on one and on two ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwire import errors, optim


class OfBatch(nn.Module):
    """The whole batch chooses, by numbers that the example's never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 2, dtype=torch.float64)
        self.other = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x):
        return torch.cond(x.sum() > 1000, lambda x: self.one(x).sin(), lambda x: self.other(x) * 2, (x,))


class OfSwitch(OfBatch):
    """A buffer chooses, the same for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.steps.add_(1)
        return torch.cond(self.steps < 2.5, lambda x: self.one(x).sin(), lambda x: self.other(x) * 2, (x,))


def check(model, net, x, y):
    loss = (net(x) - y).square().mean()
    result = model.compute_gradients(x, y, training=False)
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    expected = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(dict(net.named_parameters()), expected, strict=True):
        found = result.gradients[name]
        assert (torch.zeros_like(gradient) if found is None else found).sub(gradient).norm() <= 1e-11


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_chooses_its_branch_and_is_not_split(client, workers):
    torch.manual_seed(workers)
    net = OfBatch()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), workers=workers)
    if workers > 1:
        assert model.info().sharding.mode == "whole"
    for rows, shift in ((5, 0.0), (7, 100.0), (2, 100.0)):
        check(model, net, torch.randn(rows, 3, dtype=torch.float64) + shift, torch.randn(rows, 2, dtype=torch.float64))
    model.delete()


def test_a_buffer_chooses_for_all_rows_and_those_are_spread(client):
    torch.manual_seed(0)
    net = OfSwitch()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    model = client.create_model(net, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.0), example=(x, y), workers=2)
    assert model.info().sharding.mode == "rows"
    for _ in range(4):
        loss = (net(x) - y).square().mean()
        assert model.train_step(x, y).loss == pytest.approx(loss.item(), rel=1e-12)
    model.delete()


def test_an_if_on_a_tensor_is_refused_with_its_line_and_is_told_of_cond(client):
    class Branches(OfBatch):
        def forward(self, x):
            if x.sum() > 0:
                return self.one(x)
            return self.other(x)

    line = Branches.forward.__code__.co_firstlineno + 1
    with pytest.raises(errors.ExportError, match=r"torch\.cond") as caught:
        client.create_model(Branches(), loss=None, example=(torch.randn(5, 3, dtype=torch.float64),))
    assert caught.value.reason == "EXPORT_DATA_DEPENDENT" and f"{__file__}:{line}" in str(caught.value)
