"""Bounds of each open size, apart from the others, within which everything holds that torch.export took for granted.

Torch's guards may tie sizes to each other (a product of two), or leave gaps (even numbers); a symbol of the contract
has a least and a largest size, and nothing else. What bounds cannot say leaves a size with the example's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

_MOST = 1 << 31

Bounds = tuple[int, int | None]
"""(least, largest); None: no largest."""


def largest_box(
    guards: Iterable[sympy.Basic],
    ranges: Mapping[Any, Bounds],
    sizes: Mapping[Any, int],
) -> dict[Any, Bounds] | None:
    """Bounds around `sizes`, as wide as can be shown, within which all `guards` hold; None where there are none.

    Symbols that are in `ranges` and not in `sizes` keep their bounds.
    """
    box = dict(ranges)
    # The deepest first: it often implies the others.
    for guard in sorted(guards, key=lambda guard: (-guard.count_ops(), str(guard))):
        if _holds(guard, box):
            continue
        free = sorted((each for each in guard.free_symbols if each in sizes), key=str)
        wide = {symbol: box[symbol] for symbol in free}
        box |= {symbol: (sizes[symbol], sizes[symbol]) for symbol in free}
        if not _holds(guard, box):
            return None
        for symbol in free:
            box[symbol] = _widened(guard, box, symbol, sizes[symbol], wide[symbol])
    return box


def equal_symbols(guards: Iterable[sympy.Basic], sizes: Mapping[Any, int]) -> dict[Any, Any]:
    """The symbols that are others by a guard such as rows * a == rows * b, which torch leaves as it is: {a: b}."""
    equal: dict[Any, Any] = {}
    for guard in guards:
        if not isinstance(guard.xreplace(equal), sympy.Eq):
            continue
        free = sorted((each for each in guard.xreplace(equal).free_symbols if each in sizes), key=str)
        for one, other in ((one, other) for one in free for other in free if one != other):
            if sizes[one] == sizes[other] and guard.xreplace(equal).xreplace({one: other}) == sympy.true:
                equal = {symbol: each.xreplace({one: other}) for symbol, each in equal.items()} | {one: other}
                break
    return equal


def _widened(guard: sympy.Basic, box: Mapping[Any, Bounds], symbol: Any, size: int, wide: Bounds) -> Bounds:
    """Bounds of a symbol around its size: as wide as `guard` allows with the others' bounds, and `wide` at most."""

    def fits(low: int, high: int | None) -> bool:
        return _holds(guard, {**box, symbol: (low, high)})

    least, largest = wide
    if not fits(size, largest):
        most = _MOST if largest is None else largest
        largest = size + _farthest(lambda step: fits(size, size + step), most - size)
    return size - _farthest(lambda step: fits(size - step, largest), size - least), largest


def _farthest(holds: Callable[[int], bool], most: int) -> int:
    """The largest step up to `most` for which it holds, if it holds up to some step and not beyond; it does for 0."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _holds(guard: sympy.Basic, box: Mapping[Any, Bounds]) -> bool:
    """Whether it can be shown to hold everywhere in the box."""
    known = {symbol: sympy.Integer(low) for symbol, (low, high) in box.items() if low == high}
    guard = guard.subs({symbol: value for symbol, value in known.items() if symbol in guard.free_symbols})
    ranges = {
        symbol: ValueRanges(low, int_oo if high is None else high)
        for symbol, (low, high) in box.items()
        if symbol in guard.free_symbols
    }
    shown: Any = bound_sympy(guard, ranges)  # type: ignore[arg-type]
    return bool(shown.is_singleton() and shown.lower)
