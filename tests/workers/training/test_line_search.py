"""LBFGS: the batch is evaluated again as in torch, and a search that fails changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workers.training.optimizer_loops import (
    assert_same_bits,
    batch,
    close,
    gradients_of,
    layers,
)

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import OptimizerSpec


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.5, "max_iter": 5, "history_size": 3},
        {"line_search_fn": "strong_wolfe", "max_iter": 4, "max_eval": 9},
    ],
)
def test_lbfgs_evaluates_the_batch_again_as_in_torch_also_after_a_move(options, ranks, make_group):
    module = layers()
    spec = OptimizerSpec("LBFGS", options)
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.LBFGS(reference.parameters(), **options)
    x, y = batch(7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(reference(x), y)
        loss.backward()
        return loss

    for step in range(4):
        if step == 2:
            weights, state = group.state_dict(), group.call_all("optimizer_state")[0]
            group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec)
            group.call_all("load_state_dict", weights, partial=False)
            group.call_all("load_optimizer_state", state)
            assert_same_bits(group.call_all("optimizer_state")[0], state)
        expected = float(optimizer.step(closure).detach())
        # Two ranks add up in another order, and every search makes more of the difference.
        assert group.train_step(x, y) == pytest.approx(expected, rel=1e-4 if ranks > 1 else 1e-10)
    close(group.state_dict(), reference, tolerance=1e-3 if ranks > 1 else 1e-10)


def test_lbfgs_without_a_batch_is_refused(make_group):
    module = layers()
    group = make_group(module, nn.MSELoss(), batch(), ranks=1, optimizer=OptimizerSpec("LBFGS", {}))
    group.forward_backward(*batch())
    for gradients in (None, gradients_of(module)):
        with pytest.raises(FailedPrecondition, match="train_step") as caught:
            group.optimizer_step(gradients)
        assert caught.value.reason == "OPTIMIZER_NEEDS_BATCH"


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_that_fails_halfway_puts_weights_buffers_and_state_back(ranks, make_group):
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    # After a first step this long the loss is no number.
    spec = OptimizerSpec("LBFGS", {"lr": 1e200, "max_iter": 5})
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec, on_nan="refuse")
    state = group.call_all("optimizer_state")[0]
    with pytest.raises(InvalidArgument) as caught:
        group.train_step(*batch(6))
    assert caught.value.reason in ("LOSS_NOT_FINITE", "GRADIENT_NOT_FINITE")
    assert_same_bits(group.state_dict(), dict(module.state_dict()))
    assert_same_bits(group.call_all("optimizer_state")[0], state)


def test_rank_that_fails_at_the_end_of_a_search_has_all_ranks_put_everything_back(make_group):
    group = make_group(layers(), nn.MSELoss(), batch(), ranks=2, optimizer=OptimizerSpec("LBFGS", {"max_iter": 3}))
    x, y = batch(6)
    group.train_step(x, y)
    before, states = group.state_dict(), group.call_all("optimizer_state")
    fault = """
passes = trainer._passes
if trainer._groups.rank == 1:
    def fail(shard):
        del passes.shared_buffers
        raise RuntimeError("no memory for buffers")
    passes.shared_buffers = fail
"""
    group.call_all("run", fault)
    with pytest.raises(Exception, match="no memory for buffers"):
        group.train_step(x, y)
    assert_same_bits(group.state_dict(), before)
    assert_same_bits(group.call_all("optimizer_state"), states)
    reference = group.train_step(x, y)
    assert math.isfinite(reference)
