"""The loads of a sweep: how many requests wait at once, or how many come each second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradwire.errors import InvalidArgument

_MOST_LEVELS = 1000

MOST = 100_000
"""Requests in flight, or each second, at most: a tester of one core cannot send more."""


@dataclass(frozen=True, slots=True)
class Load:
    """One level of a sweep. `kind`: "concurrency", requests in flight, or "rate", requests due each second."""

    kind: str
    value: float

    @property
    def is_rate(self) -> bool:
        return self.kind == "rate"

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


def parse_loads(kind: str, text: str) -> tuple[Load, ...]:
    """The levels that an option asks for: "8", "1,4,16", "1:16" or "1:16:2" (from, to, step; both ends).

    Raises InvalidArgument where it is none of these, or names a level that is not above 0, or above 100,000.
    """
    field = f"--{kind}"
    try:
        values = _range(text) if ":" in text else [float(part) for part in text.split(",")]
    except ValueError:
        message = f'expected a number, a list "1,4,16" or a range "1:16:2", got {text!r:.80}'
        raise InvalidArgument(message, field=field, reason="LOAD_INVALID") from None
    for value in values:
        if not (math.isfinite(value) and value > 0) or (kind == "concurrency" and value != int(value)):
            expected = "whole numbers of at least 1" if kind == "concurrency" else "numbers above 0"
            raise InvalidArgument(f"expected {expected}, got {value:g}", field=field, reason="LOAD_INVALID")
        if value > MOST:
            message = f"expected at most {MOST:,}, got {value:g}"
            raise InvalidArgument(message, field=field, reason="LOAD_INVALID")
    return tuple(Load(kind, value) for value in values)


def _range(text: str) -> Sequence[float]:
    parts = [float(part) for part in text.split(":")]
    start, end, step = parts if len(parts) == 3 else (*parts, 1.0)
    if not step > 0 or not math.isfinite(start) or not start <= end < start + step * _MOST_LEVELS:
        raise ValueError(text)
    # Half a thousandth of a step more, for ends that no float hits.
    return [start + index * step for index in range(math.floor((end - start) / step + 0.0005) + 1)]
