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
    """A finite number, in the bounds. `above`, `below`: bounds that are left out. An int where `whole`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False

    def __call__(self, value: Any) -> str | None:
        right = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if right and math.isfinite(value) and self.least <= value <= self.most and self.above < value < self.below:
            return None
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound))
        return ("an int" if self.whole else "a finite number") + (f" of {words}" if words else "")


@dataclass(frozen=True)
class OneOf:
    """One of these values."""

    values: tuple[Any, ...]

    def __call__(self, value: Any) -> str | None:
        # 1 equals True, and is something else.
        if any(type(value) is type(each) and value == each for each in self.values):
            return None
        return "one of " + ", ".join(repr(each) for each in self.values)


@dataclass(frozen=True)
class Optional:
    """None, or what `check` takes."""

    check: Check

    def __call__(self, value: Any) -> str | None:
        expected = None if value is None else self.check(value)
        return None if expected is None else f"None or {expected}"


@dataclass(frozen=True)
class Several:
    """A tuple or list: of as many items as there are checks, each for its own."""

    checks: tuple[Check, ...]

    def __call__(self, value: Any) -> str | None:
        if isinstance(value, (tuple, list)) and len(value) == len(self.checks):
            expected = [check(item) for check, item in zip(self.checks, value, strict=True)]
            wrong = [f"[{index}] to be {words}" for index, words in enumerate(expected) if words is not None]
            return ", ".join(wrong) or None
        return f"a sequence of {len(self.checks)}"


@dataclass(frozen=True)
class Each:
    """A tuple or list of any length, with the same check for every item; with `alone`, also an item by itself."""

    check: Check
    alone: bool = False

    def __call__(self, value: Any) -> str | None:
        if isinstance(value, (tuple, list)):
            words = next((words for item in value if (words := self.check(item)) is not None), None)
            return None if words is None else f"each to be {words}"
        words = self.check(value)
        if not self.alone:
            return "a sequence"
        return None if words is None else f"{words}, or a sequence of such"


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
