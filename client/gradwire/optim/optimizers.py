"""Every dense optimizer of torch.optim, with torch's names and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from gradwire.optim.checks import (
    Flag,
    Foreach,
    NotDifferentiable,
    NotNegative,
    Number,
    number,
    one_of,
    optional,
    refusal,
    several,
    whole,
)
from gradwire.optim.spec import Optimizer

_BETA = number(least=0.0, below=1.0)
Betas = Annotated[tuple[float, float], several(_BETA, _BETA)]


@dataclass(frozen=True, kw_only=True)
class Adadelta(Optimizer):
    """torch.optim.Adadelta. Raises InvalidArgument for an argument out of range, as all specs do."""

    lr: NotNegative = 1.0
    rho: Annotated[float, number(least=0.0, most=1.0)] = 0.9
    eps: NotNegative = 1e-6
    weight_decay: NotNegative = 0.0
    foreach: Foreach = None
    capturable: Flag = False
    maximize: Flag = False
    differentiable: NotDifferentiable = False


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """torch.optim.Adafactor."""

    lr: NotNegative = 1e-2
    beta2_decay: Annotated[float, number(most=0.0)] = -0.8
    eps: Annotated[tuple[float | None, float], several(optional(number(least=0.0)), number(least=0.0))] = (None, 1e-3)
    d: Annotated[float, number(least=1.0)] = 1.0
    weight_decay: NotNegative = 0.0
    foreach: Foreach = None
    maximize: Flag = False


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """torch.optim.Adagrad."""

    lr: NotNegative = 1e-2
    lr_decay: NotNegative = 0.0
    weight_decay: NotNegative = 0.0
    initial_accumulator_value: NotNegative = 0.0
    eps: NotNegative = 1e-10
    foreach: Foreach = None
    maximize: Flag = False
    differentiable: NotDifferentiable = False
    fused: Foreach = None


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """torch.optim.Adam."""

    lr: NotNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    amsgrad: Flag = False
    foreach: Foreach = None
    maximize: Flag = False
    capturable: Flag = False
    differentiable: NotDifferentiable = False
    fused: Foreach = None
    decoupled_weight_decay: Flag = False


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """torch.optim.AdamW."""

    lr: NotNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 1e-2
    amsgrad: Flag = False
    maximize: Flag = False
    foreach: Foreach = None
    capturable: Flag = False
    differentiable: NotDifferentiable = False
    fused: Foreach = None


@dataclass(frozen=True, kw_only=True)
class Adamax(Optimizer):
    """torch.optim.Adamax."""

    lr: NotNegative = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    foreach: Foreach = None
    maximize: Flag = False
    differentiable: NotDifferentiable = False
    capturable: Flag = False


@dataclass(frozen=True, kw_only=True)
class ASGD(Optimizer):
    """torch.optim.ASGD."""

    lr: NotNegative = 1e-2
    lambd: Number = 1e-4
    alpha: Number = 0.75
    t0: Number = 1e6
    weight_decay: NotNegative = 0.0
    foreach: Foreach = None
    maximize: Flag = False
    differentiable: NotDifferentiable = False
    capturable: Flag = False


@dataclass(frozen=True, kw_only=True)
class LBFGS(Optimizer):
    """torch.optim.LBFGS: in train_step only, where the service evaluates the batch again. Takes no groups."""

    lr: NotNegative = 1.0
    max_iter: Annotated[int, whole(least=1, most=1_000_000)] = 20
    max_eval: Annotated[int | None, optional(whole(least=1))] = None
    tolerance_grad: NotNegative = 1e-7
    tolerance_change: NotNegative = 1e-9
    history_size: Annotated[int, whole(least=1, most=10_000)] = 100
    line_search_fn: Annotated[str | None, one_of(None, "strong_wolfe")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups:
            raise refusal("optimizer.groups", "LBFGS doesn't support per-parameter options (parameter groups)")


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """torch.optim.Muon, where the service's torch has it: for parameters of two dimensions only."""

    lr: NotNegative = 1e-3
    weight_decay: NotNegative = 0.1
    momentum: NotNegative = 0.95
    nesterov: Flag = True
    ns_coefficients: Annotated[tuple[float, float, float], several(number(), number(), number())] = (
        3.4445,
        -4.775,
        2.0315,
    )
    eps: NotNegative = 1e-7
    ns_steps: Annotated[int, whole(least=0, most=99)] = 5
    adjust_lr_fn: Annotated[str | None, one_of(None, "original", "match_rms_adamw")] = None


@dataclass(frozen=True, kw_only=True)
class NAdam(Optimizer):
    """torch.optim.NAdam."""

    lr: NotNegative = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    momentum_decay: NotNegative = 4e-3
    decoupled_weight_decay: Flag = False
    foreach: Foreach = None
    maximize: Flag = False
    capturable: Flag = False
    differentiable: NotDifferentiable = False


@dataclass(frozen=True, kw_only=True)
class RAdam(Optimizer):
    """torch.optim.RAdam."""

    lr: NotNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    decoupled_weight_decay: Flag = False
    foreach: Foreach = None
    maximize: Flag = False
    capturable: Flag = False
    differentiable: NotDifferentiable = False


@dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """torch.optim.RMSprop."""

    lr: NotNegative = 1e-2
    alpha: NotNegative = 0.99
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    momentum: NotNegative = 0.0
    centered: Flag = False
    capturable: Flag = False
    foreach: Foreach = None
    maximize: Flag = False
    differentiable: NotDifferentiable = False


@dataclass(frozen=True, kw_only=True)
class Rprop(Optimizer):
    """torch.optim.Rprop."""

    lr: NotNegative = 1e-2
    etas: Annotated[tuple[float, float], several(number(above=0.0, below=1.0), number(above=1.0))] = (0.5, 1.2)
    step_sizes: Annotated[tuple[float, float], several(number(least=0.0), number(least=0.0))] = (1e-6, 50.0)
    capturable: Flag = False
    foreach: Foreach = None
    maximize: Flag = False
    differentiable: NotDifferentiable = False


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """torch.optim.SGD: stochastic gradient descent, with momentum where asked. nesterov needs it, and dampening 0."""

    lr: NotNegative = 1e-3
    momentum: NotNegative = 0.0
    dampening: Number = 0.0
    weight_decay: NotNegative = 0.0
    nesterov: Flag = False
    maximize: Flag = False
    foreach: Foreach = None
    differentiable: NotDifferentiable = False
    fused: Foreach = None

    def _check_together(self, values: Mapping[str, Any], field: str) -> None:
        super()._check_together(values, field)
        if values["nesterov"] and (values["momentum"] <= 0 or values["dampening"] != 0):
            raise refusal(f"{field}.nesterov", "Nesterov momentum requires a momentum and zero dampening")
