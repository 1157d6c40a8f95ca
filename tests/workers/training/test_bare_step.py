"""A step without torch's wrappers changes parameters as the wrapped one does."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from gradwire_workers.training.bare_step import BareStep


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    """Two with the same weights and gradients; one parameter has none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    twin = deepcopy(net)
    for parameter, other in list(zip(net.parameters(), twin.parameters(), strict=True))[:-1]:
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    return net, twin


CHANGES: list[dict[str, Any]] = [
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"foreach": True},
    {"fused": True},
]


@pytest.mark.parametrize("changes", [{}, {"lr": 0.3}])
def test_a_plain_step_has_the_bits_of_torchs(nets, changes):
    net, twin = nets
    optimizer, torchs = (torch.optim.SGD(each.parameters(), lr=0.1) for each in nets)
    step = BareStep(optimizer)
    for each in (optimizer, torchs):
        each.param_groups[0].update(changes)
    assert step.is_plain
    parameters = list(net.parameters())
    step.plain(parameters, [each.grad for each in parameters])
    torchs.step()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


@pytest.mark.parametrize("changes", CHANGES)
def test_a_step_is_no_longer_plain_once_an_option_asks_for_more(nets, changes):
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=0.1)
    step = BareStep(optimizer)
    assert step.is_plain
    optimizer.param_groups[0].update(changes)
    assert not step.is_plain


def test_a_step_of_two_groups_is_not_plain(nets):
    first, last = nets[0].children()
    groups = [{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.5}]
    assert not BareStep(torch.optim.SGD(groups, lr=0.1)).is_plain


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adafactor"])
def test_a_step_of_another_optimizer_has_the_bits_of_torchs(nets, name):
    net, twin = nets
    optimizer, torchs = (getattr(torch.optim, name)(each.parameters(), lr=0.1) for each in nets)
    step = BareStep(optimizer)
    assert not step.is_plain
    for _ in range(3):
        step()
        torchs.step()
    assert torch.is_grad_enabled()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
