"""Losses that draw random numbers: on every number of ranks, gradients are those of the loss that was computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def factored(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * torch.rand(())).mean() * 36


def dropped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(F.dropout(outputs, 0.5), targets)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3).double(), torch.randn(rows, 2).double()


@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients_are_of_the_loss_that_was_computed(make_group, ranks):
    module = nn.Linear(3, 2).double()
    group = make_group(module, factored, batch(4), ranks=ranks)
    assert group.whole["train"] is None
    inputs, targets = batch(5)
    factors = []
    for _ in range(3):
        found, _, _ = group.compute_gradients(inputs, targets)
        factor = found.loss / (module(inputs).mean().item() * 36)
        torch.testing.assert_close(found.gradients["bias"], torch.full((2,), 18 * factor, dtype=torch.float64))
        factors.append(factor)
    assert len(set(factors)) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_random_loss_repeats_with_the_seed(make_group, ranks, dropout):
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(dropout)).double()
    group = make_group(module, dropped, batch(4), ranks=ranks)
    inputs, targets = batch(6)
    found = [group.compute_gradients(inputs, targets, seed=seed)[0] for seed in (5, 5, 5, 6)]
    assert found[0].loss == found[1].loss == found[2].loss != found[3].loss
    assert torch.equal(found[0].gradients["0.weight"], found[2].gradients["0.weight"])


@pytest.mark.parametrize(("ranks", "dropout"), [(1, 0.0), (1, 0.5), (2, 0.0)])
def test_a_random_loss_draws_what_torch_draws_from_the_same_seed(make_group, ranks, dropout, assert_close):
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(dropout)).double()
    group = make_group(module, dropped, batch(4), ranks=ranks)
    inputs, targets = batch(6)
    found, _, _ = group.compute_gradients(inputs, targets, seed=5)
    torch.manual_seed(5)
    expected = dropped(module(inputs), targets)
    expected.backward()
    assert found.loss == pytest.approx(expected.item(), rel=1e-12)
    assert_close(found.gradients, {name: each.grad for name, each in module.named_parameters()})


def test_each_examples_gradients_repeat_with_the_seed_where_the_loss_is_random(make_group):
    group = make_group(nn.Linear(3, 2).double(), dropped, batch(4), ranks=1)
    inputs, targets = batch(6)
    once, again = (group.compute_gradients(inputs, targets, per_example=True, seed=5)[0] for _ in range(2))
    assert torch.equal(once.gradients["weight"], again.gradients["weight"])


def test_what_a_random_loss_is_over_rows_is_tried_with_its_randomness_off(make_group):
    group = make_group(nn.Linear(3, 2).double(), dropped, batch(4), loss_reduction="mean")
    assert group.whole["train"] is None and group.loss["train"] is not None
