"""Checks of the plain arguments that users pass: what is wrong is refused by its name, before anything is sent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

from gradwire_proto.errors import InvalidArgument

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def as_bool(value: Any, field: str) -> bool:
    """`value`, which must be True or False: other values would count as one of them."""
    if isinstance(value, bool):
        return value
    raise wrong_type(value, field, "True or False")


def as_int(value: Any, field: str) -> int:
    """`value` as an int of 64 bits, as all are on the wire: NumPy's integers are taken, bools are not."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise wrong_type(value, field, "an int")
    number = int(value)
    if not _INT64_MIN <= number <= _INT64_MAX:
        # Python does not print one of thousands of digits.
        given = number if number.bit_length() < 1000 else f"one of {number.bit_length()} bits"
        message = f"expected an int from {_INT64_MIN} to {_INT64_MAX}, got {given}"
        raise InvalidArgument(message, field=field, reason="INTEGER_OUT_OF_RANGE")
    return number


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


def as_iterator(value: Any, field: str, expected: str) -> Iterator[Any]:
    """An iterator over `value`, which must be iterable. What its own `__iter__` raises is its own."""
    if isinstance(value, Iterable) or hasattr(type(value), "__getitem__"):
        return iter(value)
    raise wrong_type(value, field, expected)


def argument_of(field: str | None, names: Mapping[str, str]) -> str | None:
    """The path of a field as its user knows it. names: of fields of a request, the arguments that they come from."""
    head = "" if field is None else re.split(r"[.\[]", field, maxsplit=1)[0]
    return names[head] + field[len(head) :] if field is not None and head in names else field


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
