"""Dropout through a real service: a mask of its own for each call, and the same again where a seed is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradwire
from gradwire import optim


class AlwaysDropping(nn.Module):
    """Drops in eval mode too, as Monte Carlo dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5)


X, Y = torch.randn(8, 16), torch.randn(8, 64)


@pytest.fixture
def model(client: gradwire.Client) -> gradwire.Model:
    return client.create_model(
        AlwaysDropping(), loss="mse_loss", optimizer=optim.SGD(lr=0.0), example=(X, Y), workers=2, seed=3
    )


def test_gradients_see_a_fresh_mask_at_each_call_and_the_same_one_for_the_same_seed(model):
    def bias(seed: int | None = None) -> Tensor:
        return model.compute_gradients(X, Y, wrt="linear.bias", seed=seed).gradients["linear.bias"]

    assert not torch.equal(bias(), bias())
    assert torch.equal(bias(seed=5), bias(seed=5))
    assert not torch.equal(bias(seed=5), bias(seed=6))


def test_steps_of_gradients_and_update_see_a_fresh_mask_each(model):
    losses = set()
    for _ in range(4):
        result = model.compute_gradients(X, Y)
        losses.add(result.loss)
        model.optimizer_step(result.gradients)
    assert len(losses) == 4


@pytest.mark.parametrize("training", [True, False])
def test_outputs_see_a_fresh_mask_at_each_call(model, training):
    first, second = (model.forward(X, training=training) for _ in range(2))
    assert not torch.equal(first == 0, second == 0)


def test_drawing_seeds_leaves_the_caller_s_own_random_numbers_alone(model):
    before = torch.get_rng_state()
    model.compute_gradients(X, Y)
    model.forward(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_see_a_fresh_mask_at_each_call_and_the_same_one_after_manual_seed(client):
    gradient = client.grad(lambda x: F.dropout(x, 0.5).sum())
    x = torch.ones(100)
    assert not torch.equal(gradient(x), gradient(x))
    torch.manual_seed(1)
    first = gradient(x)
    torch.manual_seed(1)
    assert torch.equal(gradient(x), first)
