"""Python's operators in graphs: arithmetic on sizes, kept to numbers of 64 bits.

Unbounded, a few nodes make a number or a text that fills the memory: "%50000000d" % 5, [0] * 10**12, 9**9**9.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.operators import resolve

_LEAST, _MOST = -(2**63), 2**63 - 1
_MOST_EXPONENT = 63


@cache
def bounded(name: str) -> Callable[..., Any]:
    """The allowed operator `name`, for numbers alone. Raises InvalidArgument ARITHMETIC_FAILED."""
    if name == "operator.getitem":
        return item_of
    operator = resolve(name)

    def calculate(*numbers: Any) -> Any:
        for number in numbers:
            # torch.sym_sum takes its numbers as a list.
            for each in number if name == "torch.sym_sum" and isinstance(number, (list, tuple)) else (number,):
                _check_number(each, name)
        if name == "operator.pow":
            _check_power(*numbers)
        try:
            result = operator(*numbers)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise _failed(name, str(error)) from error
        _check_number(result, name)
        return result

    return calculate


def item_of(items: Any, index: Any) -> Any:
    """An item of what an operator returned."""
    if not isinstance(items, (list, tuple)) or not isinstance(index, int):
        raise _failed("operator.getitem", "expected a list of results and the place of one")
    try:
        return items[index]
    except IndexError as error:
        raise _failed("operator.getitem", str(error)) from error


def _check_power(base: Any = 0, exponent: Any = 0, *_: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > _MOST_EXPONENT and abs(base) > 1:
        raise _failed("operator.pow", f"the exponent {exponent} is larger than {_MOST_EXPONENT}")


def _check_number(value: Any, name: str) -> None:
    if not isinstance(value, (int, float)):
        raise _failed(name, f"expected numbers, got a {type(value).__name__}")
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        raise _failed(name, "the number does not fit into 64 bits")


def _failed(name: str, message: str) -> InvalidArgument:
    return InvalidArgument(f"{name}: {message}", field="batch", reason="ARITHMETIC_FAILED")
