"""Every learning-rate schedule: each update has torch's own rate, also after a move of its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from workers.training.optimizer_loops import (
    MOMENTUM,
    STEPS,
    Local,
    assert_same_bits,
    batch,
    close,
    gradients_of,
    layers,
)

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import OptimizerSpec, ParameterGroupSpec, ScheduleSpec

Part = tuple[str, dict[str, Any]]
SCHEDULES: list[tuple[str, dict[str, Any], list[Part]]] = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}, []),
    ("MultiStepLR", {"milestones": (2, 5, 5, 11), "gamma": 0.5}, []),
    ("ConstantLR", {"factor": 0.25, "total_iters": 4}, []),
    ("LinearLR", {"start_factor": 0.1, "end_factor": 0.8, "total_iters": 8}, []),
    ("ExponentialLR", {"gamma": 0.9}, []),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.01}, []),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.01}, []),
    ("PolynomialLR", {"total_iters": 12, "power": 2.0}, []),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 3, "step_size_down": 4}, []),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 2, "mode": "exp_range", "gamma": 0.95}, []),
    ("OneCycleLR", {"max_lr": 0.3, "total_steps": STEPS}, []),
    ("OneCycleLR", {"max_lr": 0.3, "epochs": 5, "steps_per_epoch": 4, "three_phase": True}, []),
    ("OneCycleLR", {"max_lr": 0.3, "total_steps": 30, "anneal_strategy": "linear", "cycle_momentum": False}, []),
    ("SequentialLR", {"milestones": (4, 9)}, [
        ("LinearLR", {"start_factor": 0.1, "total_iters": 4}),
        ("CosineAnnealingLR", {"T_max": 5}),
        ("ExponentialLR", {"gamma": 0.8}),
    ]),
    ("ChainedScheduler", {}, [("LinearLR", {"total_iters": 5}), ("ExponentialLR", {"gamma": 0.9})]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def local_schedule(optimizer: torch.optim.Optimizer, name: str, options: dict[str, Any], parts: list[Part]) -> Any:
    made = [getattr(lr_scheduler, part)(optimizer, **own) for part, own in parts]
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(made, optimizer)
    if name == "SequentialLR":
        return lr_scheduler.SequentialLR(optimizer, made, **options)
    return getattr(lr_scheduler, name)(optimizer, **options)


def spec_of(name: str, options: dict[str, Any], parts: list[Part]) -> ScheduleSpec:
    return ScheduleSpec(name, options, tuple(ScheduleSpec(part, own) for part, own in parts))


@pytest.mark.parametrize(
    ("name", "options", "parts", "ranks"),
    [(*each, 1 + index % 2) for index, each in enumerate(SCHEDULES)],
    ids=[each[0] for each in SCHEDULES],
)
def test_schedule_gives_each_update_torchs_learning_rate_also_after_a_move(name, options, parts, ranks, make_group):
    module = layers()
    spec = OptimizerSpec("SGD", MOMENTUM, schedule=spec_of(name, options, parts))
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec)
    local = Local(module, lambda m: torch.optim.SGD(m.parameters(), **MOMENTUM))
    local.schedule = local_schedule(local.optimizer, name, options, parts)
    for step in range(STEPS):
        if step == STEPS // 2:
            weights, state = group.state_dict(), group.call_all("optimizer_state")[0]
            group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec)
            group.call_all("load_state_dict", weights, partial=False)
            group.call_all("load_optimizer_state", state)
        gradients = gradients_of(module)
        assert group.optimizer_step(gradients).lr == local.step(gradients)
    close(group.state_dict(), local.module)


def test_cycled_momentum_of_adam_is_its_first_beta(make_group):
    module, options = layers(), {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 3}
    spec = OptimizerSpec("Adam", {"lr": 0.1}, schedule=ScheduleSpec("CyclicLR", options))
    group = make_group(module, nn.MSELoss(), batch(), ranks=1, optimizer=spec)
    local = Local(module, lambda m: torch.optim.Adam(m.parameters(), lr=0.1))
    local.schedule = lr_scheduler.CyclicLR(local.optimizer, **options)
    for _ in range(STEPS):
        gradients = gradients_of(module)
        local.step(gradients)
        group.optimizer_step(gradients)
    close(group.state_dict(), local.module)


@pytest.mark.parametrize("ranks", [1, 2])
def test_plateau_is_told_by_the_loss_of_the_whole_batch(ranks, make_group):
    module, options = layers(), {"factor": 0.5, "patience": 1, "cooldown": 1, "threshold": 0.05}
    spec = OptimizerSpec("SGD", MOMENTUM, schedule=ScheduleSpec("ReduceLROnPlateau", options))
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=spec)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), **MOMENTUM)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    rates = set()
    for _ in range(STEPS):
        x, y = batch(5)
        optimizer.zero_grad()
        loss = F.mse_loss(reference(x), y)
        loss.backward()
        rates.add(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(loss.item())
        assert group.train_step(x, y) == pytest.approx(loss.item(), rel=1e-12)
    close(group.state_dict(), reference)
    assert len(rates) > 2
    with pytest.raises(FailedPrecondition, match="ReduceLROnPlateau") as caught:
        group.optimizer_step(gradients_of(module))
    assert caught.value.reason == "SCHEDULE_NEEDS_LOSS"
    close(group.state_dict(), reference)


def test_lr_of_a_call_is_for_that_call_alone_and_the_schedule_goes_on(make_group):
    module = layers()
    spec = OptimizerSpec("SGD", MOMENTUM, schedule=ScheduleSpec("ExponentialLR", {"gamma": 0.5}))
    group = make_group(module, nn.MSELoss(), batch(), ranks=1, optimizer=spec)
    used = [group.optimizer_step(gradients_of(module), lr=lr).lr for lr in (None, 0.7, None, 0.0, None)]
    assert used == [0.2, 0.7, 0.05, 0.0, 0.0125]
    plain = make_group(module, nn.MSELoss(), batch(), ranks=1, sgd=MOMENTUM)
    assert [plain.optimizer_step(gradients_of(module), lr=lr).lr for lr in (0.7, None)] == [0.7, 0.2]


def test_schedule_without_a_further_step_refuses_the_update_and_nothing_changes(make_group):
    module = layers()
    spec = OptimizerSpec("SGD", MOMENTUM, schedule=ScheduleSpec("OneCycleLR", {"max_lr": 0.3, "total_steps": 4}))
    group = make_group(module, nn.MSELoss(), batch(), ranks=2, optimizer=spec)
    for _ in range(4):
        group.train_step(*batch())
    before, state = group.state_dict(), group.call_all("optimizer_state")[0]
    connections = group.processes.new_generation()
    for update in (lambda: group.train_step(*batch()), lambda: group.optimizer_step(gradients_of(module))):
        with pytest.raises(FailedPrecondition, match="total steps is 4") as caught:
            update()
        assert caught.value.reason == "SCHEDULE_FAILED"
    assert group.processes.new_generation() == connections + 1, "all ranks refuse alike: none has to join again"
    assert_same_bits(group.state_dict(), before)
    assert_same_bits(group.call_all("optimizer_state")[0], state)


def test_schedule_moves_every_group_from_its_own_learning_rate(make_group):
    module = layers()
    spec = OptimizerSpec(
        "SGD", {"lr": 0.1}, (ParameterGroupSpec("*.bias", {"lr": 0.4}),), ScheduleSpec("ExponentialLR", {"gamma": 0.5})
    )
    group = make_group(module, nn.MSELoss(), batch(), ranks=1, optimizer=spec)
    group.optimizer_step(gradients_of(module))
    rates = [each["lr"] for each in group.call_all("optimizer_state")[0]["param_groups"]]
    assert rates == [0.05, 0.2]
