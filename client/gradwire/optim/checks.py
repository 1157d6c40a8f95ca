"""Checks of the arguments of specs: each says what a value must be, and gives it as it travels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral
from typing import Annotated, Any, TypeAlias, get_type_hints

from gradwire.arguments import is_finite_number
from gradwire_proto.errors import InvalidArgument

Check: TypeAlias = Callable[[Any, str, str], Any]
"""(value, field, words) -> the value as it travels, or InvalidArgument. `words`: what torch calls it."""


def check_number(value: Any, *, field: str, words: str) -> None:
    """Raise InvalidArgument unless `value` is a finite number."""
    if not is_finite_number(value):
        raise refusal(field, f"Invalid {words}: {value!r}; must be a finite number"[:300])


def check_not_negative(value: Any, *, field: str, words: str) -> None:
    """Raise InvalidArgument unless `value` is a finite number >= 0."""
    check_number(value, field=field, words=words)
    if value < 0:
        raise refusal(field, f"Invalid {words}: {value!r}; must be >= 0")


def check_positive(value: Any, *, field: str, words: str) -> None:
    """Raise InvalidArgument unless `value` is a finite number > 0."""
    check_number(value, field=field, words=words)
    if value <= 0:
        raise refusal(field, f"Invalid {words}: {value!r}; must be > 0")


def number(
    *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Check:
    """A finite number in the bounds; `above` and `below` are left out themselves."""

    def check(value: Any, field: str, words: str) -> float:
        check_number(value, field=field, words=words)
        if least <= value <= most and above < value < below:
            return float(value)
        bounds = {">=": least, ">": above, "<=": most, "<": below}
        needed = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
        raise refusal(field, f"Invalid {words}: {value!r}; must be {needed}")

    return check


def whole(*, least: int, most: int = 2**63 - 1) -> Check:
    """An int in the bounds."""

    def check(value: Any, field: str, words: str) -> int:
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if is_whole and least <= int(value) <= most:
            return int(value)
        bounds = f">= {least}" if most == 2**63 - 1 else f"from {least} to {most}"
        raise refusal(field, f"Invalid {words}: {value!r}; must be an int {bounds}"[:300])

    return check


def one_of(*values: Any) -> Check:
    """One of the values. 1 is not True."""

    def check(value: Any, field: str, words: str) -> Any:
        if any(value is each or (type(value) is type(each) and value == each) for each in values):
            return value
        kind = "a bool, " if set(values) == {True, False} else ""
        raise refusal(field, f"must be {kind}one of {', '.join(map(repr, values))}, not {value!r}"[:300])

    return check


def optional(other: Check) -> Check:
    """None, or what the other takes."""
    return lambda value, field, words: None if value is None else other(value, field, words)


def several(*checks: Check) -> Check:
    """A sequence of as many items as there are checks, each for its own."""

    def check(value: Any, field: str, words: str) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list)) or len(value) != len(checks):
            raise refusal(field, f"Invalid {words}: {value!r}; must be a tuple of {len(checks)}"[:300])
        items = zip(value, checks, strict=True)
        return tuple(one(item, f"{field}[{index}]", words) for index, (item, one) in enumerate(items))

    return check


def each(one: Check, *, alone: bool = False) -> Check:
    """A sequence of what `one` takes; with `alone`, also an item by itself."""

    def check(value: Any, field: str, words: str) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(one(item, f"{field}[{index}]", words) for index, item in enumerate(value))
        if alone:
            return one(value, field, words)
        raise refusal(field, f"Invalid {words}: {value!r}; must be a sequence"[:300])

    return check


def only(value: Any, why: str) -> Check:
    """One value; others are refused with the reason."""

    def check(given: Any, field: str, words: str) -> Any:
        if type(given) is type(value) and given == value:
            return given
        raise refusal(field, f"must be {value!r}: {why}")

    return check


Flag = Annotated[bool, one_of(False, True)]
Number = Annotated[float, number()]
NotNegative = Annotated[float, number(least=0.0)]
Foreach = Annotated[bool | None, one_of(None, False, True)]
NotDifferentiable = Annotated[bool, only(False, "nobody can differentiate through an update on the service")]

_WORDS = {"lr": "learning rate", "eps": "epsilon value", "betas": "beta parameter", "etas": "eta values"}


@cache
def checks_of(spec: type) -> Mapping[str, Check]:
    """The check of each argument of a spec, from the types that it is annotated with."""
    hints = get_type_hints(spec, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def checked(spec: type, arguments: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The arguments of a spec as they travel; InvalidArgument at `{field}.{name}` for one that is out of range."""
    checks = checks_of(spec)
    return {
        name: checks[name](value, f"{field}.{name}", _WORDS.get(name, f"{name} value"))
        for name, value in arguments.items()
    }


def refusal(field: str, message: str) -> InvalidArgument:
    """The error of an argument that is out of range."""
    return InvalidArgument(message, field=field, reason="OPTIMIZER_ARGUMENT_INVALID")
