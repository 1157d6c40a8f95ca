"""Gradients are clipped as in torch, and the norm before that is told."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from workers.training.optimizer_loops import (
    MOMENTUM,
    batch,
    close,
    gradients_of,
    layers,
)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "clip", [{"clip_grad_norm": 0.1}, {"clip_grad_value": 0.02}, {"clip_grad_norm": 0.1, "clip_grad_value": 0.02}]
)
def test_gradients_of_all_ranks_are_clipped_as_in_torch_and_the_norm_before_is_told(clip, ranks, make_group):
    module = layers()
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, sgd=MOMENTUM, **clip)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), **MOMENTUM)

    def update() -> float:
        norm = math.sqrt(sum(float(each.grad.norm()) ** 2 for each in reference.parameters() if each.grad is not None))
        if "clip_grad_norm" in clip:
            nn.utils.clip_grad_norm_(reference.parameters(), clip["clip_grad_norm"])
        if "clip_grad_value" in clip:
            nn.utils.clip_grad_value_(reference.parameters(), clip["clip_grad_value"])
        optimizer.step()
        optimizer.zero_grad()
        return norm

    for _ in range(3):
        x, y = batch(5)
        F.mse_loss(reference(x), y).backward()
        group.train_step(x, y)
        assert group.reports[0].grad_norm == pytest.approx(update(), rel=1e-12)
    for _ in range(2):
        x, y = batch(5)
        (2 * F.mse_loss(reference(x), y)).backward()
        group.forward_backward(x, y)
        assert group.reports[0].grad_norm is None
        group.forward_backward(x, y)
        assert group.optimizer_step().grad_norm == pytest.approx(update(), rel=1e-12)
        group.zero_grad()
    gradients = gradients_of(module)
    for name, parameter in reference.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    assert group.optimizer_step(gradients).grad_norm == pytest.approx(update(), rel=1e-12)
    close(group.state_dict(), reference)


@pytest.mark.parametrize("ranks", [1, 2])
def test_held_gradients_stay_unclipped(ranks, make_group):
    group = make_group(layers(), nn.MSELoss(), batch(), ranks=ranks, clip_grad_norm=1e-3)
    group.forward_backward(*batch())
    norms = [group.optimizer_step().grad_norm for _ in range(2)]
    assert norms[0] == norms[1] > 1e-3


def test_norm_is_computed_only_where_gradients_are_clipped(make_group):
    group = make_group(layers(), nn.MSELoss(), batch(), ranks=1)
    group.train_step(*batch())
    assert group.reports[0].grad_norm is None
