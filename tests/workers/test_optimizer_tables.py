"""Which optimizers, schedules and groups the ranks make, and what they refuse, by the path of the field."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import ModelSpec, OptimizerSpec, ParameterGroupSpec, Program, ScheduleSpec
from gradwire_workers.optimizers import make_optimizer, optimizer_kind
from gradwire_workers.schedules import make_schedule
from gradwire_workers.training.first_step import TensorLike, first_states
from gradwire_workers.training.updater_making import make_updater

OPTIMIZERS = [
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [1, 2]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "PolynomialLR": {},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 9},
    "ReduceLROnPlateau": {},
}
HOSTILE = [math.nan, math.inf, "0.1", b"1", [[]], {}, 2**62 + 0.5j]


def parameters(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in (shapes or {"w": (2, 3)}).items()}


def arguments_of(kind: Any, *without: str) -> set[str]:
    return set(inspect.signature(kind).parameters) - set(without)


def refused(call: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_takes_every_argument_of_torchs(name):
    theirs = arguments_of(getattr(torch.optim, name), "params")
    defaults = {
        argument: parameter.default
        for argument, parameter in inspect.signature(getattr(torch.optim, name)).parameters.items()
        if argument != "params"
    }
    assert set(optimizer_kind(name, field="name").options) == theirs
    make_optimizer(OptimizerSpec(name, defaults), parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_how_an_update_is_computed_is_for_torch_to_choose_by_device_unless_it_is_asked_for(name):
    """Its loop on the CPU, all parameters at once on CUDA: the bits of a training loop without a service."""
    made = make_optimizer(OptimizerSpec(name), given := parameters())
    theirs = getattr(torch.optim, name)(given.values())
    assert made.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    if "foreach" in made.defaults:
        assert made.defaults["foreach"] is None and made.defaults.get("fused") is None


@pytest.mark.parametrize("name", ["SparseAdam", "Optimizer", "lr_scheduler", "__class__", "sgd", ""])
def test_what_is_no_dense_optimizer_is_unknown(name):
    error = refused(lambda: make_optimizer(OptimizerSpec(name), parameters()))
    assert (error.reason, error.field) == ("OPTIMIZER_UNKNOWN", "model.optimizer.name")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hostile_value_of_any_option_is_refused_and_named(name):
    for option in [*optimizer_kind(name, field="name").options, "no_such_option"]:
        for value in HOSTILE:
            error = refused(lambda: make_optimizer(OptimizerSpec(name, {option: value}), parameters()))  # noqa: B023
            assert error.field == f'model.optimizer.options["{option}"]', (option, value)
            assert error.reason == ("OPTION_UNKNOWN" if option == "no_such_option" else "OPTION_OUT_OF_RANGE")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_shows_what_torch_keeps_of_each_parameter(name):
    given = parameters(wide=(3, 5), square=(2, 2), row=(1, 7))
    kind = optimizer_kind(name, field="name")
    options = {"momentum": 0.9} if name == "SGD" else {}
    found = first_states(kind.make, options, list(given.values()), owner=name, field="f")
    optimizer = kind.make(given.values(), **options)
    for each in given.values():
        each.grad = torch.ones_like(each)
    if name != "LBFGS":
        optimizer.step()
        for like, each in zip(found, given.values(), strict=True):
            state = optimizer.state[each]
            assert set(like) == set(state) != set()
            for key, value in state.items():
                assert like[key] == TensorLike(shape=tuple(value.shape), dtype=value.dtype, device=value.device), key


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("Muon", {"w": (2, 2), "b": (3,)}, "2D"),
        ("Muon", {"w": (2, 0)}, ""),
        ("Adafactor", {"w": (0, 2)}, ""),
        ("LBFGS", {"w": (0,)}, ""),
    ],
)
def test_parameters_that_torch_could_not_update_are_refused_when_the_model_is_made(name, given, said):
    error = refused(lambda: make_optimizer(OptimizerSpec(name), parameters(**given)))
    assert (error.reason, error.field) == ("OPTIMIZER_UNFIT", "model.optimizer")
    assert f"torch.optim.{name} cannot update" in error.message and said in error.message


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_complex_parameters_are_refused_where_torch_cannot_update_them(name):
    given = {"w": nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))}
    assert refused(lambda: make_optimizer(OptimizerSpec(name), given)).reason == "OPTIMIZER_UNFIT"
    make_optimizer(OptimizerSpec("Adam"), given)


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "reason", "field"),
    [
        ([("x*", {})], "NO_MATCH", "groups[0].pattern"),
        ([("W", {})], "NO_MATCH", "groups[0].pattern"),
        ([("frozen", {})], "PARAMETER_FROZEN", "groups[0].pattern"),
        ([("*.b", {}), ("a.*", {})], "GROUPS_OVERLAP", "groups[1].pattern"),
        ([("a.w", {}), ("tied", {})], "GROUPS_OVERLAP", "groups[1].pattern"),
        ([("*", {"momentum": -1.0})], "OPTION_OUT_OF_RANGE", 'groups[0].options["momentum"]'),
        ([("*", {"rate": 1.0})], "OPTION_UNKNOWN", 'groups[0].options["rate"]'),
        ([("*", {"params": []})], "OPTION_UNKNOWN", 'groups[0].options["params"]'),
        ([("*", {"fused": True})], "OPTION_UNKNOWN", 'groups[0].options["fused"]'),
        ([("*", {"nesterov": True})], "OPTION_OUT_OF_RANGE", "groups[0].options"),
    ],
)
def test_groups_that_cannot_be_are_refused_by_path(groups, reason, field):
    given = parameters(**{"a.w": (2,), "a.b": (2,), "c.b": (2,)})
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    aliases = {**given, "tied": given["a.w"], "frozen": frozen}
    spec = OptimizerSpec("SGD", {}, tuple(ParameterGroupSpec(*each) for each in groups))
    error = refused(lambda: make_optimizer(spec, given, aliases))
    assert (error.reason, error.field) == (reason, f"model.optimizer.{field}")


def test_lbfgs_takes_no_groups():
    spec = OptimizerSpec("LBFGS", {}, (ParameterGroupSpec("*", {}),))
    assert refused(lambda: make_optimizer(spec, parameters())).field == "model.optimizer.groups"


def test_parameters_of_no_group_come_first_and_no_group_is_empty():
    given = parameters(a=(1,), b=(2,), c=(3,))

    def sizes(*patterns: str) -> list[list[int]]:
        spec = OptimizerSpec("SGD", {}, tuple(ParameterGroupSpec(each) for each in patterns))
        return [[each.numel() for each in group["params"]] for group in make_optimizer(spec, given).param_groups]

    assert sizes("b") == [[1, 3], [2]]
    assert sizes("[ab]", "c") == [[1, 2], [3]]


# --- schedules ----------------------------------------------------------------------------------------------------


def sgd() -> torch.optim.Optimizer:
    return make_optimizer(OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}), parameters())


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_takes_every_argument_of_torchs(name):
    for argument, parameter in inspect.signature(getattr(lr_scheduler, name)).parameters.items():
        if argument not in ("optimizer", *SCHEDULES[name]):
            make_schedule(ScheduleSpec(name, {**SCHEDULES[name], argument: parameter.default}), sgd())


@pytest.mark.parametrize("name", SCHEDULES)
def test_hostile_value_of_any_argument_of_a_schedule_is_refused_and_named(name):
    known = arguments_of(getattr(lr_scheduler, name), "optimizer")
    for option in [*known, "optimizer", "no_such_option"]:
        for value in HOSTILE:
            spec = ScheduleSpec(name, {**SCHEDULES[name], option: value})
            error = refused(lambda: make_schedule(spec, sgd()))  # noqa: B023
            assert error.field == f'model.optimizer.schedule.options["{option}"]', (option, value)


@pytest.mark.parametrize(
    ("spec", "optimizer", "reason", "field"),
    [
        (ScheduleSpec("LambdaLR"), "SGD", "SCHEDULE_UNKNOWN", "name"),
        (ScheduleSpec("MultiplicativeLR"), "SGD", "SCHEDULE_UNKNOWN", "name"),
        (ScheduleSpec("LRScheduler"), "SGD", "SCHEDULE_UNKNOWN", "name"),
        (ScheduleSpec("StepLR"), "SGD", "OPTION_OUT_OF_RANGE", "options"),
        (ScheduleSpec("StepLR", {"step_size": 1, "last_epoch": 4}), "SGD", "OPTION_OUT_OF_RANGE",
         'options["last_epoch"]'),
        (ScheduleSpec("OneCycleLR", {"max_lr": 0.1}), "SGD", "OPTION_OUT_OF_RANGE", "options"),
        (ScheduleSpec("OneCycleLR", {"max_lr": [0.1, 0.2], "total_steps": 3}), "SGD", "OPTION_OUT_OF_RANGE", "options"),
        (ScheduleSpec("CyclicLR", SCHEDULES["CyclicLR"]), "Adagrad", "SCHEDULE_UNFIT", 'options["cycle_momentum"]'),
        (ScheduleSpec("OneCycleLR", SCHEDULES["OneCycleLR"]), "Rprop", "SCHEDULE_UNFIT", 'options["cycle_momentum"]'),
        (ScheduleSpec("CyclicLR", {**SCHEDULES["CyclicLR"], "max_momentum": 1.0}), "Adam", "SCHEDULE_UNFIT",
         'options["max_momentum"]'),
        (ScheduleSpec("CyclicLR", {**SCHEDULES["CyclicLR"], "base_momentum": 0.0}), "RMSprop", "SCHEDULE_UNFIT",
         'options["base_momentum"]'),
        (ScheduleSpec("StepLR", {"step_size": 1}, (ScheduleSpec("LinearLR"),)), "SGD", "OPTION_UNKNOWN", "schedulers"),
        (ScheduleSpec("ChainedScheduler"), "SGD", "OPTION_OUT_OF_RANGE", "options"),
        (ScheduleSpec("ChainedScheduler", {}, (ScheduleSpec("ReduceLROnPlateau"),)), "SGD", "SCHEDULE_UNFIT",
         "schedulers[0]"),
        (ScheduleSpec("SequentialLR", {"milestones": []}, ()), "SGD", "OPTION_OUT_OF_RANGE", "options"),
        (ScheduleSpec("SequentialLR", {"milestones": [1, 2]}, (ScheduleSpec("LinearLR"),)), "SGD",
         "OPTION_OUT_OF_RANGE", "options"),
        (ScheduleSpec("SequentialLR", {"milestones": [1]}, (ScheduleSpec("LinearLR"), ScheduleSpec(
            "ChainedScheduler", {}, (ScheduleSpec("LinearLR"),)))), "SGD", "SCHEDULE_UNFIT", "schedulers[1]"),
        (ScheduleSpec("ChainedScheduler", {}, (ScheduleSpec("LinearLR"), ScheduleSpec("LinearLR", {"x": 1}))), "SGD",
         "OPTION_UNKNOWN", 'schedulers[1].options["x"]'),
    ],
)  # fmt: skip
def test_schedule_that_cannot_be_or_does_not_fit_is_refused_by_path(spec, optimizer, reason, field):
    made = make_optimizer(OptimizerSpec(optimizer, {}), parameters())
    error = refused(lambda: make_schedule(spec, made))
    assert (error.reason, error.field) == (reason, f"model.optimizer.schedule.{field}")


# --- clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, "1", True])
@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
def test_bound_of_gradients_that_is_none_is_refused(name, bound):
    program = Program(torch_version="2", tensors=(), variants=(), operators={})
    spec = ModelSpec(program=program, optimizer=OptimizerSpec("SGD"), **{name: bound})
    error = refused(lambda: make_updater(spec, parameters(), parameters()))
    assert (error.reason, error.field) == ("OPTION_OUT_OF_RANGE", f"model.{name}")


def test_complex_gradients_cannot_be_cut_to_a_value():
    program = Program(torch_version="2", tensors=(), variants=(), operators={})
    given = {"w": nn.Parameter(torch.ones(2, dtype=torch.complex64))}
    spec = ModelSpec(program=program, optimizer=OptimizerSpec("SGD"), clip_grad_value=1.0)
    assert refused(lambda: make_updater(spec, given, given)).field == "model.clip_grad_value"


@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
def test_bound_of_gradients_without_an_optimizer_is_refused(name):
    program = Program(torch_version="2", tensors=(), variants=(), operators={})
    error = refused(lambda: make_updater(ModelSpec(program=program, **{name: 1.0}), parameters(), parameters()))
    assert (error.reason, error.field) == ("NO_OPTIMIZER", f"model.{name}")
