"""Learning-rate schedules by their names in torch.optim.lr_scheduler. To add one, add a line to the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import ScheduleSpec
from gradwire_workers.training.option_check import Check, Each, Number, OneOf, Optional, check_options
from gradwire_workers.training.schedule import Schedule

_FLAG = OneOf((False, True))
_ANY = Number()
_NOT_NEGATIVE = Number(least=0.0)
_STEPS = Number(least=1, whole=True)
_COUNT = Number(least=0, whole=True)
_RATES = Each(_NOT_NEGATIVE, alone=True)
_CYCLED = {"cycle_momentum": _FLAG, "base_momentum": _RATES, "max_momentum": _RATES}
_MADE_OF_OTHERS = ("SequentialLR", "ChainedScheduler")
_OF_CODE = ("LambdaLR", "MultiplicativeLR")


def _no_code(value: Any) -> str | None:
    return None if value is None else "None: code does not cross the wire"


def _from_the_start(value: Any) -> str | None:
    return None if value == -1 else "-1: load an optimizer's state to go on where another model was"


_TABLE: Mapping[str, Mapping[str, Check]] = {
    "StepLR": {"step_size": _STEPS, "gamma": _ANY},
    "MultiStepLR": {"milestones": Each(_COUNT), "gamma": _ANY},
    "ConstantLR": {"factor": Number(above=0.0, most=1.0), "total_iters": _COUNT},
    "LinearLR": {
        "start_factor": Number(above=0.0, most=1.0),
        "end_factor": Number(least=0.0, most=1.0),
        "total_iters": _COUNT,
    },
    "ExponentialLR": {"gamma": _ANY},
    "CosineAnnealingLR": {"T_max": _STEPS, "eta_min": _ANY},
    "CosineAnnealingWarmRestarts": {"T_0": _STEPS, "T_mult": _STEPS, "eta_min": _ANY},
    "PolynomialLR": {"total_iters": _STEPS, "power": _ANY},
    "CyclicLR": {
        "base_lr": _RATES,
        "max_lr": _RATES,
        "step_size_up": _STEPS,
        "step_size_down": Optional(_STEPS),
        "mode": OneOf(("triangular", "triangular2", "exp_range")),
        "gamma": _ANY,
        "scale_fn": _no_code,
        "scale_mode": OneOf(("cycle", "iterations")),
        **_CYCLED,
    },
    "OneCycleLR": {
        "max_lr": _RATES,
        "total_steps": Optional(_STEPS),
        "epochs": Optional(_STEPS),
        "steps_per_epoch": Optional(_STEPS),
        "pct_start": Number(least=0.0, most=1.0),
        "anneal_strategy": OneOf(("cos", "linear")),
        "div_factor": Number(above=0.0),
        "final_div_factor": Number(above=0.0),
        "three_phase": _FLAG,
        **_CYCLED,
    },
    "SequentialLR": {"milestones": Each(_COUNT)},
    "ChainedScheduler": {},
    "ReduceLROnPlateau": {
        "mode": OneOf(("min", "max")),
        "factor": Number(least=0.0, below=1.0),
        "patience": _COUNT,
        "threshold": _ANY,
        "threshold_mode": OneOf(("rel", "abs")),
        "cooldown": _COUNT,
        "min_lr": _RATES,
        "eps": _NOT_NEGATIVE,
    },
}

_RESUMABLE = frozenset(_TABLE) - {"ChainedScheduler", "ReduceLROnPlateau"}


def make_schedule(
    spec: ScheduleSpec, optimizer: torch.optim.Optimizer, *, field: str = "model.optimizer.schedule"
) -> Schedule:
    """The schedule of that optimizer, whose learning rate it sets to its first.

    Raises InvalidArgument: SCHEDULE_UNKNOWN, OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, and SCHEDULE_UNFIT where it does not
    fit the optimizer.
    """
    return Schedule(_make(spec, optimizer, field), optimizer)


def _make(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, field: str) -> Any:
    if spec.name not in _TABLE:
        hint = ": code does not cross the wire; give each call its lr instead" if spec.name in _OF_CODE else ""
        raise InvalidArgument(
            f"unknown schedule {spec.name[:80]!r}{hint}; expected one of {', '.join(_TABLE)}",
            field=f"{field}.name",
            reason="SCHEDULE_UNKNOWN",
        )
    owner = f"torch.optim.lr_scheduler.{spec.name}"
    known = dict(_TABLE[spec.name])
    if spec.name in _RESUMABLE:
        known["last_epoch"] = _from_the_start
    check_options(spec.options, known, field=f"{field}.options", owner=owner)
    if spec.schedulers and spec.name not in _MADE_OF_OTHERS:
        raise InvalidArgument(f"{owner} takes no schedulers", field=f"{field}.schedulers", reason="OPTION_UNKNOWN")
    _check_parts(spec, field)
    _check_momentum(spec, optimizer, field)
    parts = [_make(part, optimizer, f"{field}.schedulers[{index}]") for index, part in enumerate(spec.schedulers)]
    options = dict(spec.options)
    if "pct_start" in options:
        options["pct_start"] = float(spec.options["pct_start"])  # pyright: ignore[reportArgumentType]
    make = getattr(lr_scheduler, spec.name)
    try:
        if spec.name == "ChainedScheduler":
            return make(parts, optimizer)
        return make(optimizer, parts, **options) if spec.name == "SequentialLR" else make(optimizer, **options)
    except (ValueError, TypeError, ArithmeticError) as error:  # options that are missing, or contradict each other
        raise InvalidArgument(f"{owner}: {error}", field=f"{field}.options", reason="OPTION_OUT_OF_RANGE") from error


def _check_parts(spec: ScheduleSpec, field: str) -> None:
    for index, part in enumerate(spec.schedulers):
        where = f"{field}.schedulers[{index}]"
        if part.name == "ReduceLROnPlateau":
            raise InvalidArgument(
                f"{spec.name} does not support ReduceLROnPlateau, as in torch", field=where, reason="SCHEDULE_UNFIT"
            )
        if spec.name == "SequentialLR" and index > 0 and part.name in _MADE_OF_OTHERS:
            raise InvalidArgument(
                f"torch's SequentialLR cannot start a {part.name} at a milestone", field=where, reason="SCHEDULE_UNFIT"
            )


def _check_momentum(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, field: str) -> None:
    """A cycled momentum must be one that the optimizer has, and one that it can compute with."""
    if "cycle_momentum" not in _TABLE[spec.name] or not spec.options.get("cycle_momentum", True):
        return
    if "momentum" not in optimizer.defaults and "betas" not in optimizer.defaults:
        raise InvalidArgument(
            f"{type(optimizer).__name__} has neither momentum nor betas to cycle; set cycle_momentum to False",
            field=f'{field}.options["cycle_momentum"]',
            reason="SCHEDULE_UNFIT",
        )
    allowed = Number(least=0.0)
    if "betas" in optimizer.defaults:
        allowed = Number(least=0.0, below=1.0)
    elif isinstance(optimizer, torch.optim.RMSprop):
        allowed = Number(above=0.0)  # torch makes its buffer in the first step, or never
    for name in ("base_momentum", "max_momentum"):
        expected = Each(allowed, alone=True)(spec.options.get(name, 0.5))
        if expected is not None:
            raise InvalidArgument(
                f"{type(optimizer).__name__} needs {expected}, got {spec.options[name]!r}"[:300],
                field=f'{field}.options["{name}"]',
                reason="SCHEDULE_UNFIT",
            )
