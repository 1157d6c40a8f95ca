"""A small module on the service and the same one here, trained alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import gradwire
from gradwire import optim


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 4, dtype=dtype), torch.randn(rows, 3, dtype=dtype)


def mean_square(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return ((found - wanted) ** 2).mean()


class Pair:
    """A module on the service and the same one here, with an SGD optimizer each."""

    def __init__(self, client: gradwire.Client, net: nn.Module, example: tuple[Any, ...], **settings: Any) -> None:
        sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        self.model = client.create_model(net, optimizer=optim.SGD(**sgd), example=example, **settings)
        self.local = copy.deepcopy(net)
        self.remote = self.model.as_module()
        remote = (self.remote, self.model.as_optimizer())
        self.both = (remote, (self.local, torch.optim.SGD(self.local.parameters(), **sgd)))

    def assert_equal(self, tolerance: float = 1e-10) -> None:
        found = self.remote.state_dict()
        assert found.keys() == self.local.state_dict().keys()
        for name, value in self.local.state_dict().items():
            assert (found[name] - value).abs().max() <= tolerance, name

    def assert_same_gradients(self) -> None:
        for (name, here), there in zip(self.local.named_parameters(), self.remote.parameters(), strict=True):
            if here.grad is None:
                assert there.grad is None, name
            else:
                torch.testing.assert_close(there.grad, here.grad, rtol=1e-10, atol=1e-12, msg=name)
