"""Learning-rate schedules of torch.optim.lr_scheduler, with torch's names and defaults, stepped after each update.

They are plain values: an optimizer takes one as `schedule=`. LambdaLR and MultiplicativeLR are functions, and no code
crosses the wire: give each call its `lr=` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, NoReturn

from gradwire.optim.checks import (
    Flag,
    NotNegative,
    Number,
    checked,
    checks_of,
    each,
    number,
    one_of,
    only,
    optional,
    refusal,
    whole,
)
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import ScheduleSpec

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "Schedule",
    "SequentialLR",
    "StepLR",
]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of the schedules."""

    def __post_init__(self) -> None:
        checks = checks_of(type(self))
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name in checks}
        for name, value in checked(type(self), own, "schedule").items():
            object.__setattr__(self, name, value)

    @property
    def parts(self) -> tuple[Schedule, ...]:
        """The schedules that this one is made of."""
        return ()

    def spec(self) -> ScheduleSpec:
        """What travels to the service."""
        options = {name: getattr(self, name) for name in checks_of(type(self))}
        return ScheduleSpec(type(self).__name__, options, tuple(part.spec() for part in self.parts))

    def check_without_momentum(self, optimizer: str, field: str) -> None:
        """Refuse to cycle a momentum that the optimizer has not."""
        if getattr(self, "cycle_momentum", False):
            words = f"{optimizer} has neither momentum nor betas to cycle; set cycle_momentum=False"
            raise InvalidArgument(words, field=f"{field}.cycle_momentum", reason="SCHEDULE_UNFIT")
        for index, part in enumerate(self.parts):
            part.check_without_momentum(optimizer, f"{field}.schedulers[{index}]")


_STEPS = whole(least=1)
Steps = Annotated[int, _STEPS]
Count = Annotated[int, whole(least=0)]
MaybeSteps = Annotated[int | None, optional(_STEPS)]
Rates = Annotated[float | Sequence[float], each(number(least=0.0), alone=True)]
Milestones = Annotated[Sequence[int], each(whole(least=0))]
LastEpoch = Annotated[int, only(-1, "load_optimizer_state_dict goes on where another model was")]
NoFunction = Annotated[None, only(None, "a function is code, which does not cross the wire; give each call its lr=")]


@dataclass(frozen=True, kw_only=True)
class StepLR(Schedule):
    """torch.optim.lr_scheduler.StepLR."""

    step_size: Steps
    gamma: Number = 0.1
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class MultiStepLR(Schedule):
    """torch.optim.lr_scheduler.MultiStepLR."""

    milestones: Milestones
    gamma: Number = 0.1
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class ConstantLR(Schedule):
    """torch.optim.lr_scheduler.ConstantLR. A factor of 0, by which torch divides in the end, is refused."""

    factor: Annotated[float, number(above=0.0, most=1.0)] = 1.0 / 3
    total_iters: Count = 5
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class LinearLR(Schedule):
    """torch.optim.lr_scheduler.LinearLR."""

    start_factor: Annotated[float, number(above=0.0, most=1.0)] = 1.0 / 3
    end_factor: Annotated[float, number(least=0.0, most=1.0)] = 1.0
    total_iters: Count = 5
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class ExponentialLR(Schedule):
    """torch.optim.lr_scheduler.ExponentialLR."""

    gamma: Number
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingLR(Schedule):
    """torch.optim.lr_scheduler.CosineAnnealingLR."""

    T_max: Steps
    eta_min: Number = 0.0
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingWarmRestarts(Schedule):
    """torch.optim.lr_scheduler.CosineAnnealingWarmRestarts."""

    T_0: Steps
    T_mult: Steps = 1
    eta_min: Number = 0.0
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class PolynomialLR(Schedule):
    """torch.optim.lr_scheduler.PolynomialLR."""

    total_iters: Steps = 5
    power: Number = 1.0
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class CyclicLR(Schedule):
    """torch.optim.lr_scheduler.CyclicLR. Without cycle_momentum=False the optimizer must have momentum or betas."""

    base_lr: Rates
    max_lr: Rates
    step_size_up: Steps = 2000
    step_size_down: MaybeSteps = None
    mode: Annotated[str, one_of("triangular", "triangular2", "exp_range")] = "triangular"
    gamma: Number = 1.0
    scale_fn: NoFunction = None
    scale_mode: Annotated[str, one_of("cycle", "iterations")] = "cycle"
    cycle_momentum: Flag = True
    base_momentum: Rates = 0.8
    max_momentum: Rates = 0.9
    last_epoch: LastEpoch = -1


@dataclass(frozen=True, kw_only=True)
class OneCycleLR(Schedule):
    """torch.optim.lr_scheduler.OneCycleLR. An update after its last step is refused; nothing changes then."""

    max_lr: Rates
    total_steps: MaybeSteps = None
    epochs: MaybeSteps = None
    steps_per_epoch: MaybeSteps = None
    pct_start: Annotated[float, number(least=0.0, most=1.0)] = 0.3
    anneal_strategy: Annotated[str, one_of("cos", "linear")] = "cos"
    cycle_momentum: Flag = True
    base_momentum: Rates = 0.85
    max_momentum: Rates = 0.95
    div_factor: Annotated[float, number(above=0.0)] = 25.0
    final_div_factor: Annotated[float, number(above=0.0)] = 1e4
    three_phase: Flag = False
    last_epoch: LastEpoch = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps is None and (self.epochs is None or self.steps_per_epoch is None):
            raise refusal("schedule.total_steps", "You must define either total_steps OR (epochs AND steps_per_epoch)")


def _checked_parts(schedulers: Any, owner: str) -> tuple[Schedule, ...]:
    if not isinstance(schedulers, (tuple, list)) or not schedulers:
        raise refusal("schedule.schedulers", f"must be a list of schedules, not {schedulers!r}"[:300])
    for index, part in enumerate(schedulers):
        field = f"schedule.schedulers[{index}]"
        if not isinstance(part, Schedule):
            raise refusal(field, f"must be one of gradwire.optim.schedule, not {part!r}"[:300])
        if isinstance(part, ReduceLROnPlateau):
            words = f"{owner} does not support ReduceLROnPlateau, as in torch"
            raise InvalidArgument(words, field=field, reason="SCHEDULE_UNFIT")
    return tuple(schedulers)


@dataclass(frozen=True, kw_only=True)
class SequentialLR(Schedule):
    """torch.optim.lr_scheduler.SequentialLR: one schedule after another, each from its milestone on."""

    schedulers: Sequence[Schedule]
    milestones: Milestones
    last_epoch: LastEpoch = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedulers", _checked_parts(self.schedulers, "SequentialLR"))
        if len(self.milestones) != len(self.schedulers) - 1:
            words = f"must be one fewer than the {len(self.schedulers)} schedulers, got {len(self.milestones)}"
            raise refusal("schedule.milestones", words)

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return tuple(self.schedulers)


@dataclass(frozen=True, kw_only=True)
class ChainedScheduler(Schedule):
    """torch.optim.lr_scheduler.ChainedScheduler: all schedules at once, one after another in each step."""

    schedulers: Sequence[Schedule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedulers", _checked_parts(self.schedulers, "ChainedScheduler"))

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return tuple(self.schedulers)


@dataclass(frozen=True, kw_only=True)
class ReduceLROnPlateau(Schedule):
    """torch.optim.lr_scheduler.ReduceLROnPlateau, with the loss of each train_step; optimizer_step is refused."""

    mode: Annotated[str, one_of("min", "max")] = "min"
    factor: Annotated[float, number(least=0.0, below=1.0)] = 0.1
    patience: Count = 10
    threshold: Number = 1e-4
    threshold_mode: Annotated[str, one_of("rel", "abs")] = "rel"
    cooldown: Count = 0
    min_lr: Rates = 0.0
    eps: NotNegative = 1e-8


def LambdaLR(*_: Any, **__: Any) -> NoReturn:
    """Not to be had: raises InvalidArgument, which says what to do instead."""
    raise _is_code("LambdaLR")


def MultiplicativeLR(*_: Any, **__: Any) -> NoReturn:
    """Not to be had: raises InvalidArgument, which says what to do instead."""
    raise _is_code("MultiplicativeLR")


def _is_code(name: str) -> InvalidArgument:
    words = f"{name} is a function, and no code crosses the wire: give each call its lr=, or use another schedule"
    return InvalidArgument(words, field="schedule", reason="SCHEDULE_UNKNOWN")
