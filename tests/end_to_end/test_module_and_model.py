"""A model and the module and optimizer made of it: what changes one is so in the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from end_to_end.local_twin import Pair, batch, make_net, mean_square
from torch import nn

import gradwire
from gradwire import optim
from gradwire.errors import FailedPrecondition, InvalidArgument


def test_placeholders_look_like_the_parameters_and_refuse_to_be_changed_here(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    for (name, here), (there_name, there) in zip(
        pair.local.named_parameters(), pair.remote.named_parameters(), strict=True
    ):
        assert (name, here.shape, here.dtype, here.requires_grad) == (
            there_name,
            there.shape,
            there.dtype,
            there.requires_grad,
        )
        assert torch.equal(here.detach(), there.detach())
    assert [name for name, _ in pair.remote.named_buffers()] == [name for name, _ in pair.local.named_buffers()]
    with pytest.raises(FailedPrecondition, match="load_state_dict"), torch.no_grad():
        next(pair.remote.parameters()).add_(1)
    data: Any = next(pair.remote.parameters()).data
    with pytest.raises(FailedPrecondition, match="load_state_dict"):
        data.fill_(1)
    with pytest.raises(FailedPrecondition, match="load_state_dict"):
        next(pair.remote.parameters()).data = torch.zeros(8, 4, dtype=torch.float64)
    assert type(data + 1) is type(copy.deepcopy(data)) is torch.Tensor
    with pytest.raises(FailedPrecondition, match="stays on the service"):
        pair.remote.half()
    assert pair.remote.to("cpu") is pair.remote


def test_state_goes_both_ways_and_modes_are_the_modules_own(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(13)
    pair = make_pair()
    x, _ = batch()
    for net, _ in pair.both:
        net(x)
    other = {name: value + 1 for name, value in pair.local.state_dict().items()}
    for net, _ in pair.both:
        net.load_state_dict(other)
        net.eval()
    with torch.no_grad():
        torch.testing.assert_close(pair.remote(x), pair.local(x), rtol=1e-10, atol=1e-12)
    pair.assert_equal()
    with pytest.raises(RuntimeError, match="Missing key"):
        pair.remote.load_state_dict({})
    next(iter(pair.remote.children())).train()
    with pytest.raises(FailedPrecondition, match="another mode"):
        pair.remote(x)


def test_held_gradients_are_read_by_name(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    x, y = batch()
    assert pair.model.held_gradients() == {}
    for net, _ in pair.both:
        mean_square(net(x), y).backward()
    found = pair.model.held_gradients("*.bias")
    assert found.keys() == {"0.bias", "1.bias", "3.bias"}
    torch.testing.assert_close(found["3.bias"], dict(pair.local.named_parameters())["3.bias"].grad)
    with pytest.raises(InvalidArgument) as caught:
        pair.model.held_gradients("nobody")
    assert caught.value.reason == "NO_MATCH"


def test_what_update_freezes_and_unfreezes_is_so_in_the_module_and_its_optimizer(client: gradwire.Client) -> None:
    torch.manual_seed(15)
    net = make_net()
    net[3].requires_grad_(False)  # pyright: ignore[reportCallIssue, reportIndexIssue]
    model = client.create_model(net, optimizer=optim.SGD(lr=0.1, momentum=0.9), example=(batch()[0],), workers=2)
    remote, local = model.as_module(), copy.deepcopy(net)
    optimizers = [model.as_optimizer(), torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)]
    x, y = batch()
    for frozen in ({"3.*": False}, {"0.*": False, "3.*": True}, {"0.weight": True}):
        model.update(trainable=frozen)
        for pattern, trained in frozen.items():
            for name, each in local.named_parameters():
                if name.startswith(pattern.rstrip("*")):
                    each.requires_grad_(trained)
        for (name, here), there in zip(local.named_parameters(), remote.parameters(), strict=True):
            assert here.requires_grad == there.requires_grad, name
        for _ in range(2):
            for module, optimizer in zip((remote, local), optimizers, strict=True):
                optimizer.zero_grad()
                mean_square(module(x), y).backward()
                optimizer.step()
        for name, value in remote.state_dict().items():
            assert (value - local.state_dict()[name]).abs().max() <= 1e-10, name
        again = model.as_optimizer()
        assert [len(group["params"]) for group in again.param_groups] == [
            len(group["params"]) for group in optimizers[0].param_groups
        ]


def test_settings_changed_on_the_model_are_those_of_its_optimizer_here(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(16)
    pair = make_pair()
    (net, opt), (local, local_opt) = pair.both
    x, y = batch()
    state = pair.model.optimizer_state_dict()
    opt.param_groups[0]["momentum"] = local_opt.param_groups[0]["momentum"] = 0.5
    pair.model.update(lr=0.02)
    assert opt.param_groups[0]["lr"] == 0.02 and opt.param_groups[0]["momentum"] == 0.5
    opt.param_groups[0]["lr"] = local_opt.param_groups[0]["lr"] = 0.1  # what it was before, and is not any more
    for module, optimizer in ((net, opt), (local, local_opt)):
        optimizer.zero_grad()
        mean_square(module(x), y).backward()
        optimizer.step()
    pair.assert_equal()
    pair.model.load_optimizer_state_dict(state)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]) == (0.1, 0.9)
    pair.model.futures.update(lr=0.3).result()
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.3
    pair.model.update(optimizer=optim.Adam(lr=0.1, groups=[optim.ParamGroup("0.*", lr=0.2)]))
    with pytest.raises(FailedPrecondition, match="as_optimizer") as caught:
        opt.step()
    assert caught.value.reason == "GROUPS_CHANGED"
    assert [group["lr"] for group in pair.model.as_optimizer().param_groups] == [0.1, 0.2]


def test_gradients_that_the_model_itself_changes_are_read_anew(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(17)
    pair = make_pair(loss=nn.MSELoss())
    x, y = batch()
    mean_square(pair.local(x), y).backward()
    mean_square(pair.remote(x), y).backward()
    pair.assert_same_gradients()
    for module in (pair.local, pair.remote):
        first = next(iter(module.parameters()))
        assert first.grad is not None
        first.grad.mul_(0.5)
    mean_square(pair.local(x), y).backward()
    pair.model.forward_backward(x, y)
    pair.assert_same_gradients()
    pair.model.zero_grad()
    pair.local.zero_grad()
    pair.assert_same_gradients()


def test_an_option_that_the_service_cannot_take_is_refused_and_nothing_is_applied(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair()
    net, opt = pair.both[0]
    x, y = batch()
    mean_square(net(x), y).backward()
    before = net.state_dict()
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(InvalidArgument) as caught:
        opt.step()
    assert caught.value.field == 'groups[0]["lr"]'
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
