"""Optimizers by their names in torch.optim, with all their options. To add one, add a line to the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import OptimizerSpec
from gradwire_workers.parameter_groups import group_parameters
from gradwire_workers.training.first_step import first_states
from gradwire_workers.training.option_check import Check, Number, OneOf, Optional, Several, check_options

Make = Callable[..., torch.optim.Optimizer]

_FLAG = OneOf((False, True))
_ANY = Number()
_NOT_NEGATIVE = Number(least=0.0)
_BETA = Number(least=0.0, below=1.0)

_ALL = {"lr": _NOT_NEGATIVE, "weight_decay": _NOT_NEGATIVE}
_MAXIMIZE = {"maximize": _FLAG}
_BETAS = {"betas": Several((_BETA, _BETA)), "eps": _NOT_NEGATIVE}
_MOMENTUM = {"momentum": _NOT_NEGATIVE}
_DECOUPLED = {"decoupled_weight_decay": _FLAG}

# How torch computes, not what. Nobody can differentiate through an update on the service.
_FOREACH = {"foreach": OneOf((None, False, True))}
_KERNELS = {**_FOREACH, "differentiable": OneOf((False,))}
_CAPTURABLE = {**_KERNELS, "capturable": _FLAG}
_FUSED = {"fused": OneOf((None, False, True))}

_FOR_ALL_GROUPS = frozenset({"foreach", "fused", "capturable", "differentiable", "initial_accumulator_value"})
"""Options that torch reads once, or that no single group can have to itself."""


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """An optimizer of torch.optim. `options`: its arguments and what they may be."""

    name: str
    options: Mapping[str, Check]
    takes_groups: bool = True

    @property
    def group_options(self) -> dict[str, Check]:
        """Those that a parameter group may have to itself."""
        return {name: check for name, check in self.options.items() if name not in _FOR_ALL_GROUPS}

    @property
    def make(self) -> Make:
        return getattr(torch.optim, self.name)


_ADAM = {**_ALL, **_BETAS, **_MAXIMIZE, **_CAPTURABLE, **_FUSED, "amsgrad": _FLAG}

_TABLE: Mapping[str, Mapping[str, Check]] = {
    "Adadelta": {**_ALL, **_MAXIMIZE, **_CAPTURABLE, "rho": Number(least=0.0, most=1.0), "eps": _NOT_NEGATIVE},
    "Adafactor": {
        **_ALL,
        **_MAXIMIZE,
        **_FOREACH,
        "beta2_decay": Number(most=0.0),
        "eps": Several((Optional(_NOT_NEGATIVE), _NOT_NEGATIVE)),
        "d": Number(least=1.0),
    },
    "Adagrad": {
        **_ALL,
        **_MAXIMIZE,
        **_KERNELS,
        **_FUSED,
        "lr_decay": _NOT_NEGATIVE,
        "initial_accumulator_value": _NOT_NEGATIVE,
        "eps": _NOT_NEGATIVE,
    },
    "Adam": {**_ADAM, **_DECOUPLED},
    "AdamW": _ADAM,
    "Adamax": {**_ALL, **_BETAS, **_MAXIMIZE, **_CAPTURABLE},
    "ASGD": {**_ALL, **_MAXIMIZE, **_CAPTURABLE, "lambd": _ANY, "alpha": _ANY, "t0": _ANY},
    "LBFGS": {
        "lr": _NOT_NEGATIVE,
        "max_iter": Number(least=1, most=1_000_000, whole=True),
        "max_eval": Optional(Number(least=1, whole=True)),
        "tolerance_grad": _NOT_NEGATIVE,
        "tolerance_change": _NOT_NEGATIVE,
        "history_size": Number(least=1, most=10_000, whole=True),
        "line_search_fn": OneOf((None, "strong_wolfe")),
    },
    "Muon": {
        **_ALL,
        **_MOMENTUM,
        "nesterov": _FLAG,
        "ns_coefficients": Several((_ANY, _ANY, _ANY)),
        "eps": _NOT_NEGATIVE,
        "ns_steps": Number(least=0, below=100, whole=True),
        "adjust_lr_fn": OneOf((None, "original", "match_rms_adamw")),
    },
    "NAdam": {**_ALL, **_BETAS, **_MAXIMIZE, **_CAPTURABLE, **_DECOUPLED, "momentum_decay": _NOT_NEGATIVE},
    "RAdam": {**_ALL, **_BETAS, **_MAXIMIZE, **_CAPTURABLE, **_DECOUPLED},
    "RMSprop": {
        **_ALL,
        **_MAXIMIZE,
        **_MOMENTUM,
        **_CAPTURABLE,
        "alpha": _NOT_NEGATIVE,
        "eps": _NOT_NEGATIVE,
        "centered": _FLAG,
    },
    "Rprop": {
        "lr": _NOT_NEGATIVE,
        **_MAXIMIZE,
        **_CAPTURABLE,
        "etas": Several((Number(above=0.0, below=1.0), Number(above=1.0))),
        "step_sizes": Several((_NOT_NEGATIVE, _NOT_NEGATIVE)),
    },
    "SGD": {**_ALL, **_MAXIMIZE, **_MOMENTUM, **_KERNELS, **_FUSED, "dampening": _ANY, "nesterov": _FLAG},
}

_OPTIMIZERS: Mapping[str, OptimizerKind] = {
    name: OptimizerKind(name=name, options=options, takes_groups=name != "LBFGS")
    for name, options in _TABLE.items()
    if hasattr(torch.optim, name)
}


def optimizer_kind(name: str, *, field: str) -> OptimizerKind:
    """The optimizer of that name. InvalidArgument OPTIMIZER_UNKNOWN at `field`: there is none."""
    known = _OPTIMIZERS.get(name)
    if known is None:
        raise InvalidArgument(
            f"unknown optimizer {name[:80]!r}; expected one of {', '.join(_OPTIMIZERS)}",
            field=field,
            reason="OPTIMIZER_UNKNOWN",
        )
    return known


def make_optimizer(
    spec: OptimizerSpec,
    parameters: Mapping[str, nn.Parameter],
    aliases: Mapping[str, nn.Parameter] | None = None,
    *,
    field: str = "model.optimizer",
) -> torch.optim.Optimizer:
    """The torch.optim optimizer over these parameters, in groups. `aliases`: every name that a parameter has.

    Raises InvalidArgument: OPTIMIZER_UNKNOWN, OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, NOTHING_TO_TRAIN, NO_MATCH,
    PARAMETER_FROZEN, GROUPS_OVERLAP, and OPTIMIZER_UNFIT where torch could not update these parameters.
    """
    kind = optimizer_kind(spec.name, field=f"{field}.name")
    owner = f"torch.optim.{spec.name}"
    check_options(spec.options, kind.options, field=f"{field}.options", owner=owner)
    if not parameters:
        raise InvalidArgument("no parameter requires a gradient", field=field, reason="NOTHING_TO_TRAIN")
    if spec.groups and not kind.takes_groups:
        raise InvalidArgument(f"{owner} takes no groups", field=f"{field}.groups", reason="OPTION_OUT_OF_RANGE")
    for index, group in enumerate(spec.groups):
        where = f"{field}.groups[{index}].options"
        check_options(group.options, kind.group_options, field=where, owner=f"a group of {owner}")
    members = group_parameters(spec.groups, parameters, aliases or parameters, field=field)
    groups: list[dict[str, Any]] = []
    for index, names in members.items():
        own = {} if index is None else dict(spec.groups[index].options)
        where = field if index is None else f"{field}.groups[{index}]"
        group = [parameters[name] for name in names]
        # Torch itself checks the options of a group no further than their names.
        first_states(kind.make, {**spec.options, **own}, group, owner=owner, field=where)
        groups.append({"params": group, **own})
    return kind.make(groups, **spec.options)


def check_learning_rate(lr: float | None) -> None:
    """Refuse a call's learning rate that torch would refuse."""
    expected = None if lr is None else Number(least=0.0)(lr)
    if expected is not None:
        raise InvalidArgument(f"expected {expected}, got {lr!r}", field="learning_rate", reason="OPTION_OUT_OF_RANGE")


@contextmanager
def learning_rate(optimizer: torch.optim.Optimizer, lr: float | None) -> Iterator[float]:
    """Inside, all parameter groups use `lr`, if there is one. Gives the first group's."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    kept = [group["lr"] for group in groups]
    try:
        if lr is not None:
            for group in groups:
                group["lr"] = lr
        yield float(groups[0]["lr"])
    finally:
        for group, value in zip(groups, kept, strict=True):
            group["lr"] = value
