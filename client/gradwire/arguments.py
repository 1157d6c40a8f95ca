"""Checks of the plain arguments that users pass: what is wrong is refused by its name, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from gradwire_proto.errors import InvalidArgument


def as_bool(value: Any, field: str) -> bool:
    """`value`, which must be True or False: other values would count as one of them."""
    if isinstance(value, bool):
        return value
    raise wrong_type(value, field, "True or False")


def as_int(value: Any, field: str) -> int:
    """`value` as an int: NumPy's integers are taken, bools are not."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise wrong_type(value, field, "an int")


def as_count(value: Any, field: str = "chunk_size") -> int | None:
    """`value` as how many there are to be of something: None, or an int of at least 1."""
    number = None if value is None else as_int(value, field)
    if number is not None and number < 1:
        raise InvalidArgument(f"expected at least 1, got {number}", field=field, reason="NUMBER_OUT_OF_RANGE")
    return number


def as_number(value: Any, field: str, *, minimum: float) -> float:
    """`value` as a float, which must be finite and at least `minimum`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise wrong_type(value, field, "a number")
    number = float(value) if is_finite_number(value) else math.nan
    if not number >= minimum:
        message = f"expected a finite number, at least {minimum:g}, got {value!r:.80}"
        raise InvalidArgument(message, field=field, reason="NUMBER_OUT_OF_RANGE")
    return number


def as_text(value: Any, field: str) -> str:
    """`value`, which must be a str that UTF-8 can encode: Python's may hold lone surrogates."""
    if not isinstance(value, str):
        raise wrong_type(value, field, "a str")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument("expected text that UTF-8 can encode", field=field, reason="TEXT_NOT_UTF8") from None
    return value


def as_mapping(value: Any, field: str) -> Mapping[str, Any]:
    """`value`, which must be a mapping whose keys are names."""
    if not isinstance(value, Mapping):
        raise wrong_type(value, field, "a mapping of names")
    for key in value:
        if not isinstance(key, str):
            raise wrong_type(key, field, "names that are str")
        as_text(key, field)
    return value


def as_function(value: Any, field: str) -> Callable[..., Any]:
    """`value`, which must be callable."""
    if callable(value):
        return value
    raise wrong_type(value, field, "a function")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number (no bool) that a float can hold, and finite."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def wrong_type(value: Any, field: str, expected: str) -> InvalidArgument:
    """The error for an argument of another type. A tensor or a long list is named by its type alone."""
    kind = type(value).__qualname__
    shown = f"{value!r:.80}, a {kind}" if isinstance(value, (bool, Real, str, bytes, type)) else f"a {kind}"
    return InvalidArgument(f"expected {expected}, got {shown}", field=field, reason="ARGUMENT_TYPE_INVALID")
