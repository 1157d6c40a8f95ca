"""Keyword arguments that a client chose: each known, of its type, and within its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradwire_proto.errors import InvalidArgument

Check = Callable[[Any], str | None]
"""What a value must be, in words, if it is not; None if it is right."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A finite number, in the bounds. An int where `whole`."""

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False

    def __call__(self, value: Any) -> str | None:
        right = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if right and math.isfinite(value) and self.least <= value <= self.most:
            return None
        words = "an int" if self.whole else "a finite number"
        if self.least > -math.inf:
            words += f" of at least {self.least:g}"
        if self.most < math.inf:
            words += f"{' and' if self.least > -math.inf else ' of'} at most {self.most:g}"
        return words


@dataclass(frozen=True)
class OneOf:
    """One of these values."""

    values: tuple[Any, ...]

    def __call__(self, value: Any) -> str | None:
        # 1 equals True, and is something else.
        if any(value == each and type(value) is type(each) for each in self.values):
            return None
        return "one of " + ", ".join(repr(each) for each in self.values)


def check_options(options: Mapping[str, Any], known: Mapping[str, Check], *, field: str, owner: str) -> None:
    """Refuse what is unknown or out of bounds: InvalidArgument OPTION_UNKNOWN, OPTION_OUT_OF_RANGE at `field["x"]`."""
    for name, value in options.items():
        where = f'{field}["{name}"]'
        if name not in known:
            raise InvalidArgument(
                f"{owner} has no such option; it has {', '.join(known)}", field=where, reason="OPTION_UNKNOWN"
            )
        expected = known[name](value)
        if expected is not None:
            raise InvalidArgument(
                f"expected {expected}, got {value!r}"[:300], field=where, reason="OPTION_OUT_OF_RANGE"
            )
