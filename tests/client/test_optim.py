"""Optimizer and schedule specs: torch's names, arguments and refusals."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gradwire import errors, optim
from gradwire.optim import schedule

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
    "SequentialLR": {"schedulers": [schedule.StepLR(step_size=1), schedule.LinearLR()], "milestones": [3]},
    "ChainedScheduler": {"schedulers": [schedule.StepLR(step_size=1)]},
    "ReduceLROnPlateau": {},
}
HOSTILE = [math.nan, math.inf, -math.inf, 10**400, "0.1", b"1", object(), [[]], {}, 1j]


def arguments_of(theirs: Any, *without: str) -> dict[str, Any]:
    parameters = inspect.signature(theirs).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in without}


def own_arguments(spec: type) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(spec).parameters.items()
        if name not in ("groups", "schedule")
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_has_the_arguments_and_defaults_of_torch(name):
    assert own_arguments(getattr(optim, name)) == arguments_of(getattr(torch.optim, name), "params")


def test_every_dense_optimizer_of_torch_is_there():
    theirs = {name for name, kind in vars(torch.optim).items() if inspect.isclass(kind)} - {"Optimizer", "SparseAdam"}
    ours = {name for name in optim.__all__ if inspect.isclass(getattr(optim, name))} - {"Optimizer", "ParamGroup"}
    assert ours == theirs == set(OPTIMIZERS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_has_the_arguments_and_defaults_of_torch(name):
    # A chain's optimizer is the one that it is given to.
    assert own_arguments(getattr(schedule, name)) == arguments_of(getattr(lr_scheduler, name), "optimizer")


def test_every_schedule_of_torch_is_there_or_says_why_not():
    assert set(schedule.__all__) - {"Schedule"} == set(lr_scheduler.__all__) - {"LRScheduler"}
    for name in ("LambdaLR", "MultiplicativeLR"):
        with pytest.raises(errors.InvalidArgument, match=rf"{name} is a function.*give each call its lr=") as caught:
            getattr(schedule, name)(lr_lambda=lambda step: 0.9**step)
        assert caught.value.reason == "SCHEDULE_UNKNOWN"


def test_spec_carries_name_every_argument_groups_and_schedule():
    chosen = schedule.SequentialLR(
        schedulers=[schedule.ConstantLR(), schedule.ExponentialLR(gamma=0.5)], milestones=[4]
    )
    groups = [optim.ParamGroup("*.bias", momentum=0, nesterov=False)]
    spec = optim.SGD(lr=1, momentum=0.9, nesterov=True, groups=groups, schedule=chosen).spec()
    assert spec.name == "SGD"
    assert spec.options == {
        "lr": 1.0,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": True,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }
    assert [(group.pattern, group.options) for group in spec.groups] == [
        ("*.bias", {"momentum": 0.0, "nesterov": False})
    ]
    assert (spec.schedule.name, spec.schedule.options["milestones"]) == ("SequentialLR", (4,))
    assert [part.name for part in spec.schedule.schedulers] == ["ConstantLR", "ExponentialLR"]


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("SGD", {"lr": -1.0}, "optimizer.lr"),
        ("SGD", {"momentum": -0.5}, "optimizer.momentum"),
        ("SGD", {"weight_decay": -1e-9}, "optimizer.weight_decay"),
        ("SGD", {"nesterov": True}, "optimizer.nesterov"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "optimizer.nesterov"),
        ("Adadelta", {"rho": 1.5}, "optimizer.rho"),
        ("Adadelta", {"eps": -1.0}, "optimizer.eps"),
        ("Adagrad", {"lr_decay": -1.0}, "optimizer.lr_decay"),
        ("Adagrad", {"initial_accumulator_value": -1.0}, "optimizer.initial_accumulator_value"),
        ("NAdam", {"momentum_decay": -1.0}, "optimizer.momentum_decay"),
        ("RMSprop", {"alpha": -0.1}, "optimizer.alpha"),
    ],
)
def test_argument_out_of_range_says_what_torch_says_and_names_the_field(name, arguments, field):
    with pytest.raises(ValueError) as theirs:
        getattr(torch.optim, name)([torch.zeros(1)], **arguments)
    with pytest.raises(errors.InvalidArgument) as ours:
        getattr(optim, name)(**arguments)
    assert str(theirs.value) in ours.value.message
    assert ours.value.field == field


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("Adam", {"betas": (0.9, 1.0)}, "optimizer.betas[1]"),
        ("Adam", {"betas": 0.9}, "optimizer.betas"),
        ("Adam", {"betas": (0.9,)}, "optimizer.betas"),
        ("Adafactor", {"beta2_decay": 0.1}, "optimizer.beta2_decay"),
        ("Adafactor", {"eps": (-1.0, 0.1)}, "optimizer.eps[0]"),
        ("Adafactor", {"eps": (None, None)}, "optimizer.eps[1]"),
        ("Adafactor", {"d": 0.5}, "optimizer.d"),
        ("Rprop", {"etas": (1.0, 1.2)}, "optimizer.etas[0]"),
        ("Rprop", {"etas": (0.5, 1.0)}, "optimizer.etas[1]"),
        ("LBFGS", {"max_iter": 0}, "optimizer.max_iter"),
        ("LBFGS", {"history_size": 10**9}, "optimizer.history_size"),
        ("LBFGS", {"line_search_fn": "armijo"}, "optimizer.line_search_fn"),
        ("LBFGS", {"groups": [optim.ParamGroup("*", lr=0.1)]}, "optimizer.groups"),
        ("Muon", {"adjust_lr_fn": "x"}, "optimizer.adjust_lr_fn"),
        ("Muon", {"ns_steps": 100}, "optimizer.ns_steps"),
        ("Adam", {"foreach": True, "fused": True}, "optimizer.fused"),
        ("Adam", {"differentiable": True}, "optimizer.differentiable"),
        ("Adagrad", {"schedule": schedule.CyclicLR(base_lr=0.1, max_lr=0.2)}, "optimizer.schedule.cycle_momentum"),
        (
            "Rprop",
            {"schedule": schedule.ChainedScheduler(schedulers=[schedule.OneCycleLR(max_lr=0.1, total_steps=3)])},
            "optimizer.schedule.schedulers[0].cycle_momentum",
        ),
        ("SGD", {"schedule": "StepLR"}, "optimizer.schedule"),
        ("SGD", {"groups": "*.bias"}, "optimizer.groups"),
        ("SGD", {"groups": ["*.bias"]}, "optimizer.groups[0]"),
        ("SGD", {"groups": [optim.ParamGroup("a"), optim.ParamGroup("*", lr=-1)]}, "optimizer.groups[1].lr"),
        ("SGD", {"groups": [optim.ParamGroup("*", betas=(0.1, 0.2))]}, "optimizer.groups[0].betas"),
        ("SGD", {"groups": [optim.ParamGroup("*", nesterov=True)]}, "optimizer.groups[0].nesterov"),
        ("SGD", {"groups": [optim.ParamGroup("*", foreach=True)]}, "optimizer.groups[0].foreach"),
        ("Adagrad", {"groups": [optim.ParamGroup("*", initial_accumulator_value=1.0)]},
         "optimizer.groups[0].initial_accumulator_value"),
    ],
)  # fmt: skip
def test_argument_that_does_not_fit_is_refused_by_field(name, arguments, field):
    with pytest.raises(errors.InvalidArgument) as caught:
        getattr(optim, name)(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("StepLR", {"step_size": 0}, "schedule.step_size"),
        ("StepLR", {"step_size": 2.0}, "schedule.step_size"),
        ("StepLR", {"step_size": 1, "last_epoch": 3}, "schedule.last_epoch"),
        ("MultiStepLR", {"milestones": 3}, "schedule.milestones"),
        ("MultiStepLR", {"milestones": [1, -1]}, "schedule.milestones[1]"),
        ("ConstantLR", {"factor": 0.0}, "schedule.factor"),
        ("LinearLR", {"start_factor": 0.0}, "schedule.start_factor"),
        ("LinearLR", {"end_factor": 1.1}, "schedule.end_factor"),
        ("CosineAnnealingLR", {"T_max": 0}, "schedule.T_max"),
        ("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 0}, "schedule.T_mult"),
        ("PolynomialLR", {"total_iters": 0}, "schedule.total_iters"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "mode": "x"}, "schedule.mode"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "scale_fn": math.sqrt}, "schedule.scale_fn"),
        ("CyclicLR", {"base_lr": [0.1, -1.0], "max_lr": 0.2}, "schedule.base_lr[1]"),
        ("OneCycleLR", {"max_lr": 0.1}, "schedule.total_steps"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 3, "pct_start": 2.0}, "schedule.pct_start"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 3, "div_factor": 0.0}, "schedule.div_factor"),
        ("ReduceLROnPlateau", {"factor": 1.0}, "schedule.factor"),
        ("ReduceLROnPlateau", {"mode": "best"}, "schedule.mode"),
        ("SequentialLR", {"schedulers": [], "milestones": []}, "schedule.schedulers"),
        ("SequentialLR", {"schedulers": [schedule.LinearLR()], "milestones": [1]}, "schedule.milestones"),
        ("ChainedScheduler", {"schedulers": ["StepLR"]}, "schedule.schedulers[0]"),
        ("ChainedScheduler", {"schedulers": [schedule.ReduceLROnPlateau()]}, "schedule.schedulers[0]"),
    ],
)
def test_schedule_that_could_not_run_is_refused_by_field(name, arguments, field):
    with pytest.raises(errors.InvalidArgument) as caught:
        getattr(schedule, name)(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "spec",
    [*map(optim.__dict__.get, OPTIMIZERS), *map(schedule.__dict__.get, SCHEDULES)],
    ids=lambda each: each.__name__,
)
def test_hostile_value_of_any_argument_is_refused_and_its_field_named(spec):
    given = SCHEDULES.get(spec.__name__, {})
    for name in inspect.signature(spec).parameters:
        for value in HOSTILE:
            with pytest.raises(errors.InvalidArgument) as caught:
                spec(**{**given, name: value})
            assert f".{name}" in caught.value.field, (name, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, True])
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
def test_argument_that_is_no_finite_number_is_refused(name, value):
    with pytest.raises(errors.InvalidArgument, match="finite number"):
        optim.SGD(**{name: value})


@pytest.mark.parametrize("name", ["nesterov", "maximize"])
def test_flag_that_is_no_bool_is_refused(name):
    with pytest.raises(errors.InvalidArgument, match="bool"):
        optim.SGD(**{"momentum": 0.9, name: 1})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_spec_is_frozen_and_keyword_only(name):
    spec = getattr(optim, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec(lr=0.1).lr = 0.2
    with pytest.raises(TypeError):
        spec(0.1)
    with pytest.raises(TypeError, match="no_such_argument"):
        spec(no_such_argument=1)


@pytest.mark.parametrize("pattern", ["", None, 3])
def test_group_needs_a_pattern(pattern):
    with pytest.raises(errors.InvalidArgument) as caught:
        optim.ParamGroup(pattern)
    assert caught.value.field == "pattern"
