"""Settings changed half-way: the weights are those of a torch loop in which the same was done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import OptimizerSpec, ParameterGroupSpec, ScheduleSpec

RANKS = pytest.mark.parametrize("ranks", [1, 2])
Batches = list[tuple[Tensor, Tensor]]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 4).double(), torch.randn(7, 2).double()


def local_steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, after: Callable[[], Any] = int
) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
        after()


def freeze(module: nn.Module, names: tuple[str, ...], *, frozen: bool = True) -> None:
    for name in names:
        module.get_parameter(name).requires_grad_(not frozen)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
}


@RANKS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_stand_still_and_go_on_from_their_state(
    name: str, ranks: int, make_group: Any, assert_close: Any
) -> None:
    module, options = net(), OPTIMIZERS[name]
    twin, data = copy.deepcopy(module), [batch() for _ in range(9)]
    optimizer = getattr(torch.optim, name)(twin.parameters(), **options)
    group = make_group(module, nn.MSELoss(), data[0], ranks=ranks, optimizer=OptimizerSpec(name, options))
    phases: list[tuple[tuple[str, ...], bool, tuple[tuple[str, bool], ...]]] = [
        ((), True, ()),
        (("0.weight", "0.bias", "2.bias"), True, (("0.*", False), ("2.bias", False))),
        (("0.bias",), False, (("0.*", False), ("0.bias", True))),
    ]
    for index, (names, frozen, wanted) in enumerate(phases):
        part = data[3 * index : 3 * index + 3]
        freeze(twin, names, frozen=frozen)
        for answer in group.call_all("update", trainable=wanted):
            assert answer == [each for each, parameter in twin.named_parameters() if parameter.requires_grad]
        local_steps(twin, optimizer, part)
        before = group.state_dict()["2.bias"].clone()
        for x, y in part:
            group.train_step(x, y)
        assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-12)
        assert torch.equal(before, group.state_dict()["2.bias"]) == (index > 0)
    with pytest.raises(InvalidArgument) as caught:
        group.optimizer_step({"2.bias": torch.zeros(5).double()})
    assert caught.value.reason == "PARAMETER_FROZEN"


@RANKS
def test_what_was_frozen_from_the_start_can_be_unfrozen_and_joins_its_group(
    ranks: int, make_group: Any, assert_close: Any
) -> None:
    module = net()
    freeze(module, ("0.weight", "0.bias"))
    twin, data = copy.deepcopy(module), [batch() for _ in range(6)]
    biases = [each for name, each in twin.named_parameters() if name.endswith("bias")]
    weights = [each for name, each in twin.named_parameters() if name.endswith("weight")]
    optimizer = torch.optim.Adam([{"params": weights}, {"params": biases, "weight_decay": 0.1, "lr": 0.03}], lr=0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    spec = OptimizerSpec(
        "Adam",
        {"lr": 0.05},
        groups=(ParameterGroupSpec("*.bias", {"weight_decay": 0.1, "lr": 0.03}),),
        schedule=ScheduleSpec("ExponentialLR", {"gamma": 0.9}),
    )
    group = make_group(module, nn.MSELoss(), data[0], ranks=ranks, optimizer=spec)
    for part, wanted in ((data[:3], ()), (data[3:], (("0.*", True),))):
        if wanted:
            freeze(twin, ("0.weight", "0.bias"), frozen=False)
            group.call_all("update", trainable=wanted)
        local_steps(twin, optimizer, part, scheduler.step)
        for x, y in part:
            group.train_step(x, y)
        assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-12)
    assert not torch.equal(twin[0].weight, module[0].weight), "it must have been trained"
    state = group.call_all("optimizer_state")[0]
    assert state["schedule"]["state"]["last_epoch"] == 6
    assert [sorted(each["params"]) for each in state["param_groups"]] == [
        ["0.weight", "2.weight", "4.weight"],
        ["0.bias", "2.bias", "4.bias"],
    ]


@RANKS
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (None, {}),
        ("StepLR", {"step_size": 2, "gamma": 0.5}),
        ("CosineAnnealingLR", {"T_max": 8}),
        ("OneCycleLR", {"max_lr": 0.3, "total_steps": 20}),
    ],
)
def test_learning_rate_of_all_groups_changes_as_in_torchs_param_groups(
    schedule: str | None, options: dict[str, Any], ranks: int, make_group: Any, assert_close: Any
) -> None:
    module, data = net(), [batch() for _ in range(6)]
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(
        [{"params": [*twin[0].parameters()], "lr": 0.2}, {"params": [*twin[2].parameters(), *twin[4].parameters()]}],
        lr=0.1,
    )
    spec = OptimizerSpec(
        "SGD",
        {"lr": 0.1},
        groups=(ParameterGroupSpec("0.*", {"lr": 0.2}), ParameterGroupSpec("[24].*")),
        schedule=None if schedule is None else ScheduleSpec(schedule, options),
    )
    group = make_group(module, nn.MSELoss(), data[0], ranks=ranks, optimizer=spec)
    scheduler = None if schedule is None else getattr(torch.optim.lr_scheduler, schedule)(optimizer, **options)
    after = int if scheduler is None else scheduler.step
    local_steps(twin, optimizer, data[:3], after)
    for each in optimizer.param_groups:
        each["lr"] = 0.07
    local_steps(twin, optimizer, data[3:], after)
    for x, y in data[:3]:
        group.train_step(x, y)
    group.call_all("update", lr=0.07)
    for x, y in data[3:]:
        group.train_step(x, y)
    assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-12)
    rates = [each["lr"] for each in group.call_all("optimizer_state")[0]["param_groups"]]
    assert rates == pytest.approx([each["lr"] for each in optimizer.param_groups], rel=1e-12)


@RANKS
@pytest.mark.parametrize("before", [{"optimizer": OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9})}])
@pytest.mark.parametrize(
    "after",
    [
        OptimizerSpec("SGD", {"lr": 0.02, "momentum": 0.9}),
        OptimizerSpec("Adam", {"lr": 0.02}, schedule=ScheduleSpec("StepLR", {"step_size": 1})),
    ],
)
def test_a_new_optimizer_begins_anew_with_its_schedule_and_holds_what_is_trained(
    before: dict[str, Any], after: OptimizerSpec, ranks: int, make_group: Any, assert_close: Any
) -> None:
    module, data = net(), [batch() for _ in range(6)]
    twin = copy.deepcopy(module)
    local_steps(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), data[:3])
    freeze(twin, ("2.weight",))
    optimizer = getattr(torch.optim, after.name)(twin.parameters(), **after.options)
    step = int if after.schedule is None else torch.optim.lr_scheduler.StepLR(optimizer, 1).step
    local_steps(twin, optimizer, data[3:], step)
    group = make_group(module, nn.MSELoss(), data[0], ranks=ranks, **before)
    for x, y in data[:3]:
        group.train_step(x, y)
    group.call_all("update", optimizer=after, trainable=[("2.weight", False)])
    assert group.call_all("optimizer_state")[0]["state"] == {}
    for x, y in data[3:]:
        group.train_step(x, y)
    assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-12)


@RANKS
def test_gradients_held_of_what_is_frozen_are_dropped_and_others_kept(
    ranks: int, make_group: Any, assert_close: Any
) -> None:
    module, data = net(), [batch() for _ in range(2)]
    twin = copy.deepcopy(module)
    group = make_group(module, nn.MSELoss(), data[0], ranks=ranks, sgd={"lr": 0.1})
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index, (x, y) in enumerate(data):
        F.mse_loss(twin(x), y).backward()
        group.forward_backward(x, y)
        if index == 0:
            freeze(twin, ("0.weight",))
            twin[0].weight.grad = None
            group.call_all("update", trainable=[("0.weight", False)])
    optimizer.step()
    group.optimizer_step()
    assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-12)


@RANKS
def test_lbfgs_leaves_what_is_frozen_alone(ranks: int, make_group: Any, assert_close: Any) -> None:
    module, (x, y) = net(), batch()
    group = make_group(
        module, nn.MSELoss(), (x, y), ranks=ranks, optimizer=OptimizerSpec("LBFGS", {"lr": 0.3, "max_iter": 3})
    )
    group.train_step(x, y)
    twin = net()
    twin.load_state_dict(group.state_dict())
    group.call_all("update", trainable=[("0.*", False)])
    freeze(twin, ("0.weight", "0.bias"))
    optimizer = torch.optim.LBFGS([each for each in twin.parameters() if each.requires_grad], lr=0.3, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(twin(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        group.train_step(x, y)
    assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-10)


class Doubling(torch.autograd.Function):
    """A backward that is not the forward's derivative."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class FrozenInFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * Doubling.apply(self.scale) + self.shift  # type: ignore[operator]


@RANKS
def test_refusals_change_nothing(ranks: int, make_group: Any, fails_as: Any) -> None:
    x, y = torch.randn(7, 4), torch.randn(7, 2)
    group = make_group(FrozenInFunction(), nn.MSELoss(), (x, y), ranks=ranks)
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({"trainable": [("linear.*", False), ("linear.wieght", True)]}, "NO_MATCH", 'trainable["linear.wieght"]'),
        ({"trainable": [("conv.*", False)]}, "NO_MATCH", 'trainable["conv.*"]'),
        ({"trainable": [("*", False)]}, "NOTHING_TO_TRAIN", "trainable"),
        ({"trainable": [("shift", True), ("scale", True)]}, "PARAMETER_FROZEN", 'trainable["scale"]'),
        ({"lr": -1.0}, "OPTION_OUT_OF_RANGE", "learning_rate"),
        ({"optimizer": OptimizerSpec("Sgd"), "lr": 0.5}, "OPTIMIZER_UNKNOWN", "optimizer.name"),
        ({"optimizer": OptimizerSpec("SGD", {"lr": -1.0})}, "OPTION_OUT_OF_RANGE", 'optimizer.options["lr"]'),
        (
            {"optimizer": OptimizerSpec("SGD", schedule=ScheduleSpec("Step")), "trainable": [("shift", True)]},
            "SCHEDULE_UNKNOWN",
            "optimizer.schedule.name",
        ),
    ]
    for change, reason, field in refused:
        with fails_as(InvalidArgument, reason, field):
            group.call_all("update", **change)
    with pytest.raises(InvalidArgument, match=r"near it: 'linear\.weight'"):
        group.call_all("update", trainable=[("linear.wieght", True)])
    assert group.call_all("update", trainable=[("linear.bias", True)]) == [["linear.weight", "linear.bias"]] * ranks
    assert group.call_all("optimizer_state")[0]["param_groups"][0]["lr"] == 0.1
    assert "shift" in group.call_all("update", trainable=[("shift", True)])[0]
    found, _, _ = group.compute_gradients(x, y)
    twin = FrozenInFunction()
    twin.load_state_dict(group.state_dict())
    twin.shift.requires_grad_(True)
    F.mse_loss(twin(x), y).backward()
    torch.testing.assert_close(found.gradients["shift"], twin.shift.grad)


def test_learning_rate_without_optimizer_is_refused(make_group: Any, fails_as: Any) -> None:
    module, (x, y) = net(), batch()
    group = make_group(module, nn.MSELoss(), (x, y), ranks=1, optimizer=OptimizerSpec("SGD"))
    spec = replace(group.spec, optimizer=None)
    group.call("start", [((spec, dict(module.state_dict()), 0, 1, str(group.processes.folder), 10**6), {})])
    with fails_as(FailedPrecondition, "NO_OPTIMIZER"):
        group.call_all("update", lr=0.1)
    group.call_all("update", optimizer=OptimizerSpec("SGD", {"lr": 0.1}))
    group.train_step(x, y)
    assert group.reports[0].step == 1


@RANKS
def test_a_group_that_appears_after_the_learning_rate_was_changed_has_the_new_one(
    ranks: int, make_group: Any, assert_close: Any
) -> None:
    module = net()
    freeze(module, ("0.weight", "0.bias"))
    twin, data = copy.deepcopy(module), [batch() for _ in range(4)]
    rest = [*twin[2].parameters(), *twin[4].parameters()]
    spec = OptimizerSpec("SGD", {"lr": 0.5}, groups=(ParameterGroupSpec("[24].*", {"lr": 0.3}),))
    group = make_group(module, nn.MSELoss(), data[0], ranks=ranks, optimizer=spec)
    for x, y in data[:2]:
        group.train_step(x, y)
    local_steps(twin, torch.optim.SGD(rest, lr=0.3), data[:2])
    group.call_all("update", lr=0.01)
    group.call_all("update", trainable=[("0.*", True)])  # no group of the optimizer's had them
    freeze(twin, ("0.weight", "0.bias"), frozen=False)
    local_steps(twin, torch.optim.SGD(twin.parameters(), lr=0.01), data[2:])
    for x, y in data[2:]:
        group.train_step(x, y)
    assert_close(group.state_dict(), twin.state_dict(), tolerance=1e-12)


@RANKS
def test_lbfgs_that_begins_anew_with_what_is_trained_stays_where_its_schedule_was(ranks: int, make_group: Any) -> None:
    module, (x, y) = net(), batch()
    spec = OptimizerSpec("LBFGS", {"lr": 0.4, "max_iter": 2}, schedule=ScheduleSpec("StepLR", {"step_size": 2}))
    group = make_group(module, nn.MSELoss(), (x, y), ranks=ranks, optimizer=spec)
    for _ in range(3):
        group.train_step(x, y)
    before = group.call_all("optimizer_state")[0]
    group.call_all("update", trainable=[("0.*", False)])
    after = group.call_all("optimizer_state")[0]
    assert after["state"] == {}
    assert after["schedule"] == before["schedule"] and before["schedule"]["state"]["last_epoch"] == 3
    options = [
        {name: each for name, each in state["param_groups"][0].items() if name != "params"} for state in (before, after)
    ]
    assert options[0] == options[1] and options[0]["initial_lr"] == 0.4
