"""Every optimizer on gradients that are given: weights equal torch's own, and so they stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from workers.training.optimizer_loops import (
    STEPS,
    Local,
    assert_same_bits,
    batch,
    close,
    gradients_of,
    layers,
)

from gradwire_proto.values import OptimizerSpec, ParameterGroupSpec

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1, "maximize": True, "foreach": True}),
    ("Adafactor", {}),
    ("Adafactor", {"lr": 0.1, "beta2_decay": -0.5, "eps": (1e-8, 1e-2), "d": 1.5, "weight_decay": 0.1}),
    ("Adafactor", {"maximize": True, "foreach": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6}),
    ("Adagrad", {"maximize": True, "foreach": True}),
    ("Adagrad", {"lr": 0.1, "fused": True}),
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"maximize": True, "foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.1, "fused": True, "amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.2, "amsgrad": True, "maximize": True}),
    ("AdamW", {"fused": True}),
    ("Adamax", {}),
    ("Adamax", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1, "maximize": True}),
    ("ASGD", {}),
    ("ASGD", {"lr": 0.1, "lambd": 0.01, "alpha": 0.5, "t0": 5, "weight_decay": 0.1, "maximize": True}),
    ("Muon", {}),
    ("Muon", {"lr": 0.1, "momentum": 0.5, "nesterov": False, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}),
    ("NAdam", {}),
    ("NAdam", {"lr": 0.1, "betas": (0.5, 0.9), "momentum_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True}),
    ("RAdam", {}),
    ("RAdam", {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.5, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True}),
    ("Rprop", {}),
    ("Rprop", {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (1e-4, 0.5), "maximize": True}),
    ("SGD", {}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
]


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda value: value if isinstance(value, str) else None)
def test_twenty_updates_of_two_ranks_equal_torchs_and_a_parameter_without_gradient_stays(name, options, make_group):
    module = layers(name)
    group = make_group(module, nn.MSELoss(), batch(), ranks=2, optimizer=OptimizerSpec(name, options))
    local = Local(module, lambda m: getattr(torch.optim, name)(m.parameters(), **options))
    for _ in range(STEPS):
        gradients = gradients_of(module)
        local.step(gradients)
        group.optimizer_step(gradients)
    found = group.state_dict()
    close(found, local.module)
    assert torch.equal(found["aside.weight"], module.aside.weight)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda value: value if isinstance(value, str) else None)
def test_state_that_moves_to_a_new_model_halfway_changes_nothing(name, options, make_group):
    module = layers(name)
    spec = OptimizerSpec(name, options)
    group = make_group(module, nn.MSELoss(), batch(), ranks=1, optimizer=spec)
    local = Local(module, lambda m: getattr(torch.optim, name)(m.parameters(), **options))
    for step in range(STEPS):
        if step == STEPS // 2:
            weights, state = group.state_dict(), group.call_all("optimizer_state")[0]
            group = make_group(layers(name), nn.MSELoss(), batch(), ranks=1, optimizer=spec)
            group.call_all("load_state_dict", weights, partial=False)
            group.call_all("load_optimizer_state", state)
            assert_same_bits(group.call_all("optimizer_state")[0], state)
        gradients = gradients_of(module)
        local.step(gradients)
        group.optimizer_step(gradients)
    close(group.state_dict(), local.module)


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_have_options_of_their_own_and_tied_weights_are_in_one(ranks, make_group):
    module = layers()
    groups = (
        ParameterGroupSpec("*.bias", {"weight_decay": 0.0, "lr": 0.3}),
        ParameterGroupSpec("tied.*", {"betas": (0.5, 0.9)}),
    )
    spec = OptimizerSpec("AdamW", {"lr": 0.1, "weight_decay": 0.1}, groups=groups)
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec)
    local = Local(
        module,
        lambda m: torch.optim.AdamW(
            [
                {"params": [m.aside.weight, m.last.weight]},
                {"params": [m.first.bias, m.last.bias], "weight_decay": 0.0, "lr": 0.3},
                {"params": [m.first.weight], "betas": (0.5, 0.9)},
            ],
            lr=0.1,
            weight_decay=0.1,
        ),
    )
    for _ in range(STEPS):
        gradients = gradients_of(module)
        local.step(gradients)
        assert group.optimizer_step(gradients).lr == 0.1
    close(group.state_dict(), local.module)
    state = group.call_all("optimizer_state")[0]
    assert [each["params"] for each in state["param_groups"]] == [
        ["aside.weight", "last.weight"],
        ["first.bias", "last.bias"],
        ["first.weight"],
    ]
    assert set(state["state"]) == {"first.weight", "first.bias", "last.weight", "last.bias"}
