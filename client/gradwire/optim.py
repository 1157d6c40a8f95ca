"""Optimizers by their torch.optim names and arguments, as plain frozen values: the update itself runs on the ranks.

A spec checks itself where it is written: `SGD(lr=-1)` raises InvalidArgument and names the field and the bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from gradwire.arguments import is_finite_number
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import OptimizerSpec

__all__ = ["SGD", "Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base of the optimizer specs."""

    def spec(self) -> OptimizerSpec:
        """What travels to the service: the class name and its arguments."""
        return OptimizerSpec(type(self).__name__, {field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """torch.optim.SGD: stochastic gradient descent, with momentum where asked.

    lr: the learning rate, >= 0. momentum: >= 0. dampening: of momentum. weight_decay: the L2 penalty, >= 0.
    nesterov: needs momentum above 0 and dampening 0. maximize: climb instead of descend.

    Raises InvalidArgument for an argument out of range.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check_not_negative(self.lr, field="optimizer.lr", words="learning rate")
        check_not_negative(self.momentum, field="optimizer.momentum", words="momentum value")
        check_not_negative(self.weight_decay, field="optimizer.weight_decay", words="weight_decay value")
        check_number(self.dampening, field="optimizer.dampening", words="dampening value")
        for name in ("nesterov", "maximize"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(f"optimizer.{name}", f"must be a bool, not {getattr(self, name)!r}")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise _refusal("optimizer.nesterov", "Nesterov momentum requires a momentum and zero dampening")
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            object.__setattr__(self, name, float(getattr(self, name)))


def check_number(value: object, *, field: str, words: str) -> None:
    """Raise InvalidArgument unless `value` is a finite number."""
    if not is_finite_number(value):
        raise _refusal(field, f"Invalid {words}: {value!r}; must be a finite number")


def check_not_negative(value: Any, *, field: str, words: str) -> None:
    """Raise InvalidArgument unless `value` is a finite number >= 0."""
    check_number(value, field=field, words=words)
    if value < 0:
        raise _refusal(field, f"Invalid {words}: {value!r}; must be >= 0")


def _refusal(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, field=field, reason="OPTIMIZER_ARGUMENT_INVALID")
