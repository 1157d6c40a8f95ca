"""What all optimizer specs have in common: checks, parameter groups, a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from gradwire.optim.checks import checked, checks_of, refusal
from gradwire.optim.schedule import Schedule
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import OptimizerSpec, ParameterGroupSpec

_FOR_ALL_GROUPS = frozenset({"foreach", "fused", "capturable", "differentiable", "initial_accumulator_value"})
"""Arguments that torch reads once, or that no single group can have to itself."""


@dataclass(frozen=True, init=False)
class ParamGroup:
    """Parameters with arguments of their own: `ParamGroup("*.bias", weight_decay=0.0)`.

    pattern: a parameter's name, or a glob of names ("encoder.*"). A glob that matches nothing is an error, and so is a
    parameter that two groups match: neither wins. Tied weights are one parameter, which any of its names matches.
    options: arguments of the optimizer that differ for these parameters.

    Parameters that no group matches are a group of their own, before the others; there is none where all are matched.
    """

    pattern: str
    options: Mapping[str, Any]

    def __init__(self, pattern: str, /, **options: Any) -> None:
        if not isinstance(pattern, str) or not pattern:
            raise refusal("pattern", f"must be a name or a glob of names, not {pattern!r}"[:300])
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "options", options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"ParamGroup({self.pattern!r}{options})"


@dataclass(frozen=True)
class Optimizer:
    """Base of the optimizer specs.

    groups: parameters with arguments of their own. schedule: how the learning rate changes, a step after each update.
    """

    _: KW_ONLY
    groups: Sequence[ParamGroup] = ()
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name in checks_of(type(self))}
        for name, value in self._checked(own, "optimizer").items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "groups", self._checked_groups(own))
        if self.schedule is not None:
            self._check_schedule(self.schedule, own)

    def spec(self) -> OptimizerSpec:
        """What travels to the service: the class name, its arguments, groups and schedule."""
        return OptimizerSpec(
            type(self).__name__,
            {name: getattr(self, name) for name in checks_of(type(self))},
            tuple(ParameterGroupSpec(group.pattern, dict(group.options)) for group in self.groups),
            None if self.schedule is None else self.schedule.spec(),
        )

    def _checked(self, arguments: Mapping[str, Any], field: str) -> dict[str, Any]:
        """All arguments of the optimizer, or of one of its groups, as they travel."""
        values = checked(type(self), arguments, field)
        self._check_together(values, field)
        return values

    def _check_together(self, values: Mapping[str, Any], field: str) -> None:
        """Refuse arguments that contradict each other."""
        if values.get("foreach") and values.get("fused"):
            raise refusal(f"{field}.fused", "`fused` and `foreach` cannot be `True` together.")

    def _checked_groups(self, own: Mapping[str, Any]) -> tuple[ParamGroup, ...]:
        if not isinstance(self.groups, (tuple, list)):
            raise refusal("optimizer.groups", f"must be a list of ParamGroup, not {self.groups!r}"[:300])
        return tuple(self._checked_group(each, own, f"optimizer.groups[{i}]") for i, each in enumerate(self.groups))

    def _checked_group(self, group: Any, own: Mapping[str, Any], field: str) -> ParamGroup:
        if not isinstance(group, ParamGroup):
            raise refusal(field, f"must be a ParamGroup, not {group!r}"[:300])
        known = checks_of(type(self)).keys() - _FOR_ALL_GROUPS
        for name in group.options:
            if name not in known:
                words = f"a group of {type(self).__name__} has no such argument; it has {', '.join(sorted(known))}"
                raise InvalidArgument(words, field=f"{field}.{name}", reason="OPTION_UNKNOWN")
        values = self._checked({**own, **group.options}, field)
        return ParamGroup(group.pattern, **{name: values[name] for name in group.options})

    def _check_schedule(self, schedule: Any, own: Mapping[str, Any]) -> None:
        if not isinstance(schedule, Schedule):
            words = f"must be one of gradwire.optim.schedule, such as StepLR(step_size=30), not {schedule!r}"
            raise refusal("optimizer.schedule", words[:300])
        if "momentum" not in own and "betas" not in own:
            schedule.check_without_momentum(type(self).__name__, "optimizer.schedule")
