"""Optimizers and losses are made from checked options; what torch has is what they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import OptimizerSpec, TorchLossSpec
from gradwire_workers.losses import NamedLoss
from gradwire_workers.optimizers import learning_rate, make_optimizer


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"lr": 0.2, "momentum": 0.5, "dampening": 0.3, "maximize": True},
        {"lr": 0.2, "momentum": 0.9, "foreach": True},
        {"lr": 0.2, "momentum": 0.9, "fused": True, "differentiable": False},
    ],
)
def test_sgd_does_what_torch_does_with_the_same_options(options):
    ours, reference = parameter(1.0, -2.0), parameter(1.0, -2.0)
    optimizers = make_optimizer(OptimizerSpec("SGD", options), {"x": ours}), torch.optim.SGD([reference], **options)
    for _ in range(4):
        gradient = torch.randn(2, dtype=torch.float64)
        for each, optimizer in zip((ours, reference), optimizers, strict=True):
            each.grad = gradient
            optimizer.step()
    assert torch.equal(ours, reference)


@pytest.mark.parametrize(
    ("name", "options", "reason", "field"),
    [
        ("Sgd", {}, "OPTIMIZER_UNKNOWN", "model.optimizer.name"),
        ("SGD", {"rate": 0.1}, "OPTION_UNKNOWN", 'model.optimizer.options["rate"]'),
        ("SGD", {"lr": -0.1}, "OPTION_OUT_OF_RANGE", 'model.optimizer.options["lr"]'),
        ("SGD", {"lr": float("nan")}, "OPTION_OUT_OF_RANGE", 'model.optimizer.options["lr"]'),
        ("SGD", {"lr": "0.1"}, "OPTION_OUT_OF_RANGE", 'model.optimizer.options["lr"]'),
        ("SGD", {"momentum": True}, "OPTION_OUT_OF_RANGE", 'model.optimizer.options["momentum"]'),
        ("SGD", {"nesterov": 1}, "OPTION_OUT_OF_RANGE", 'model.optimizer.options["nesterov"]'),
        ("SGD", {"nesterov": True}, "OPTION_OUT_OF_RANGE", "model.optimizer.options"),
        ("SGD", {"differentiable": True}, "OPTION_OUT_OF_RANGE", 'model.optimizer.options["differentiable"]'),
        ("SGD", {"foreach": True, "fused": True}, "OPTION_OUT_OF_RANGE", "model.optimizer.options"),
    ],
)
def test_optimizer_that_torch_would_not_make_is_refused_by_field(name, options, reason, field):
    with pytest.raises(InvalidArgument) as caught:
        make_optimizer(OptimizerSpec(name, options), {"x": parameter(1.0)})
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_bound_is_named_in_the_message():
    with pytest.raises(InvalidArgument, match=r"expected a finite number of at least 0, got -0\.1"):
        make_optimizer(OptimizerSpec("SGD", {"lr": -0.1}), {"x": parameter(1.0)})


def test_optimizer_without_anything_to_train_is_refused():
    with pytest.raises(InvalidArgument) as caught:
        make_optimizer(OptimizerSpec("SGD", {}), [])
    assert caught.value.reason == "NOTHING_TO_TRAIN"


def test_learning_rate_returns_after_an_error():
    optimizer = make_optimizer(OptimizerSpec("SGD", {"lr": 0.1}), {"x": parameter(1.0)})

    def fail_with(lr: float) -> None:
        with learning_rate(optimizer, lr) as used:
            assert used == optimizer.param_groups[0]["lr"] == lr
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_with(0.7)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("name", "options", "reason", "field"),
    [
        ("mse", {}, "LOSS_UNKNOWN", "model.loss.torch.name"),
        ("mse_loss", {"reduction": "none"}, "LOSS_NOT_SCALAR", 'model.loss.torch.options["reduction"]'),
        ("mse_loss", {"reduction": "max"}, "OPTION_OUT_OF_RANGE", 'model.loss.torch.options["reduction"]'),
        ("mse_loss", {"beta": 1.0}, "OPTION_UNKNOWN", 'model.loss.torch.options["beta"]'),
        (
            "cross_entropy",
            {"label_smoothing": 1.5},
            "OPTION_OUT_OF_RANGE",
            'model.loss.torch.options["label_smoothing"]',
        ),
        ("cross_entropy", {"weight": 1.0}, "OPTION_OUT_OF_RANGE", 'model.loss.torch.options["weight"]'),
        ("cross_entropy", {"ignore_index": 0.5}, "OPTION_OUT_OF_RANGE", 'model.loss.torch.options["ignore_index"]'),
        ("huber_loss", {"delta": 0.0}, "OPTION_OUT_OF_RANGE", 'model.loss.torch.options["delta"]'),
    ],
)
def test_loss_that_torch_would_not_compute_is_refused_by_field(name, options, reason, field):
    with pytest.raises(InvalidArgument) as caught:
        NamedLoss(TorchLossSpec(name, options), torch.device("cpu"))
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("target", [-1, 3])
def test_class_out_of_range_is_refused_with_the_bound(target):
    loss = NamedLoss(TorchLossSpec("cross_entropy"), torch.device("cpu"))
    with pytest.raises(
        InvalidArgument, match=rf"target {target} is out of range: expected classes in \[0, 3\)"
    ) as caught:
        loss.over_rows(torch.randn(2, 3), torch.tensor([0, target]))
    assert (caught.value.reason, caught.value.field) == ("TARGET_OUT_OF_RANGE", "batch.targets")


def test_loss_that_broadcasts_is_no_sum_over_rows():
    loss = NamedLoss(TorchLossSpec("mse_loss"), torch.device("cpu"))
    assert loss.over_rows(torch.randn(4, 1), torch.randn(4)) is None
    assert loss.over_rows(torch.randn(4, 1), torch.randn(4, 1)) is not None
