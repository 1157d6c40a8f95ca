"""Optimizers by their names in torch.optim. To add one, add a line to the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import OptimizerSpec
from gradwire_workers.training.option_check import Check, Number, OneOf, check_options

_FLAG = OneOf((False, True))
_KERNELS = {"foreach": OneOf((None, False, True)), "fused": OneOf((None, False, True))}
# Nobody can differentiate through an update on the service.
_NOT_DIFFERENTIABLE = {"differentiable": OneOf((False,))}


@dataclass(frozen=True, kw_only=True)
class _Optimizer:
    make: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Check]


_OPTIMIZERS: Mapping[str, _Optimizer] = {
    "SGD": _Optimizer(
        make=torch.optim.SGD,
        options={
            "lr": Number(least=0.0),
            "momentum": Number(least=0.0),
            "dampening": Number(),
            "weight_decay": Number(least=0.0),
            "nesterov": _FLAG,
            "maximize": _FLAG,
            **_KERNELS,
            **_NOT_DIFFERENTIABLE,
        },
    ),
}


def make_optimizer(
    spec: OptimizerSpec, parameters: Sequence[nn.Parameter], *, field: str = "model.optimizer"
) -> torch.optim.Optimizer:
    """The torch.optim optimizer over these parameters.

    Raises InvalidArgument: OPTIMIZER_UNKNOWN, OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, NOTHING_TO_TRAIN.
    """
    known = _OPTIMIZERS.get(spec.name)
    if known is None:
        raise InvalidArgument(
            f"unknown optimizer {spec.name[:80]!r}; expected one of {', '.join(_OPTIMIZERS)}",
            field=f"{field}.name",
            reason="OPTIMIZER_UNKNOWN",
        )
    check_options(spec.options, known.options, field=f"{field}.options", owner=f"torch.optim.{spec.name}")
    if not parameters:
        raise InvalidArgument("no parameter requires a gradient", field=field, reason="NOTHING_TO_TRAIN")
    try:
        return known.make(parameters, **spec.options)
    except (ValueError, RuntimeError) as error:  # options that contradict each other
        raise InvalidArgument(str(error), field=f"{field}.options", reason="OPTION_OUT_OF_RANGE") from error


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
