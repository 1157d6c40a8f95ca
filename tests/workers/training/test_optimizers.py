"""Every optimizer and schedule, on gradients that are given: weights equal torch's own, and so they stay."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import OptimizerSpec, ParameterGroupSpec, ScheduleSpec

STEPS = 20
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

MOMENTUM = {"lr": 0.2, "momentum": 0.9}
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


class Layers(nn.Module):
    """Two matrices, one of them tied; `aside` has no gradient. Muon's parameters are matrices."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.aside = nn.Linear(4, 4, bias=bias), nn.Linear(4, 3, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(4, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tied(torch.tanh(self.first(x))))


def layers(optimizer: str = "SGD") -> Layers:
    return Layers(bias=optimizer != "Muon").double()


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double(), torch.randn(rows, 2).double()


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(each) for name, each in module.named_parameters() if name != "aside.weight"}


def local_schedule(optimizer: torch.optim.Optimizer, name: str, options: dict[str, Any], parts: list[Part]) -> Any:
    made = [getattr(lr_scheduler, part)(optimizer, **own) for part, own in parts]
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(made, optimizer)
    if name == "SequentialLR":
        return lr_scheduler.SequentialLR(optimizer, made, **options)
    return getattr(lr_scheduler, name)(optimizer, **options)


def spec_of(name: str, options: dict[str, Any], parts: list[Part]) -> ScheduleSpec:
    return ScheduleSpec(name, options, tuple(ScheduleSpec(part, own) for part, own in parts))


class Local:
    """torch's own loop over a copy of the module, with the gradients that it is given."""

    def __init__(self, module: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.module = copy.deepcopy(module)
        self.optimizer = optimizer(self.module)
        self.schedule: Any = None

    def step(self, gradients: dict[str, Tensor]) -> float:
        for name, parameter in self.module.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        used = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if self.schedule is not None:
                self.schedule.step()
        return used


def close(found: dict[str, Tensor], module: nn.Module, tolerance: float = 1e-10) -> None:
    for name, expected in module.state_dict().items():
        distance = float((found[name] - expected).norm())
        assert distance <= tolerance * max(1.0, float(expected.norm())), f"{name} is off by {distance:.1e}"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda value: value if isinstance(value, str) else None)
def test_twenty_updates_equal_torchs_and_a_parameter_without_gradient_stays(name, options, ranks, make_group):
    module = layers(name)
    group = make_group(module, nn.MSELoss(), batch(), ranks=ranks, optimizer=OptimizerSpec(name, options))
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


def assert_same_bits(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype is expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_bits(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "options", "parts"), SCHEDULES, ids=[each[0] for each in SCHEDULES])
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
    connections = group.processes.new_epoch()
    for update in (lambda: group.train_step(*batch()), lambda: group.optimizer_step(gradients_of(module))):
        with pytest.raises(FailedPrecondition, match="total steps is 4") as caught:
            update()
        assert caught.value.reason == "SCHEDULE_FAILED"
    assert group.processes.new_epoch() == connections + 1, "all ranks refuse alike: none has to join again"
    assert_same_bits(group.state_dict(), before)
    assert_same_bits(group.call_all("optimizer_state")[0], state)


# --- LBFGS --------------------------------------------------------------------------------------------------------


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


# --- clipping -----------------------------------------------------------------------------------------------------


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


# --- groups -------------------------------------------------------------------------------------------------------


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


def test_schedule_moves_every_group_from_its_own_learning_rate(make_group):
    module = layers()
    spec = OptimizerSpec(
        "SGD", {"lr": 0.1}, (ParameterGroupSpec("*.bias", {"lr": 0.4}),), ScheduleSpec("ExponentialLR", {"gamma": 0.5})
    )
    group = make_group(module, nn.MSELoss(), batch(), ranks=1, optimizer=spec)
    group.optimizer_step(gradients_of(module))
    rates = [each["lr"] for each in group.call_all("optimizer_state")[0]["param_groups"]]
    assert rates == [0.05, 0.2]
