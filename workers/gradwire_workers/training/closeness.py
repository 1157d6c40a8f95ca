"""Whether two ways to compute the same numbers agree, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far apart whole and parts may be, relative to the Euclidean norm: other shapes are rounded otherwise."""
_TOLERANCE_OF_OTHERS = 1e-4
_NEGLIGIBLE = 3e-2
"""A gradient or buffer this much smaller than all together is compared with all together: it may be rounding alone.

A bias before batch norm is: its gradient is zero, and in float32 up to 1e-6 of all gradients comes out (measured).
"""


def are_close(pairs: Sequence[tuple[Tensor | None, Tensor | None]], computed_in: torch.dtype | None = None) -> bool:
    """Whether each (found, expected) is the same, to rounding. `computed_in`: a type that some of it passed through."""
    return next(differing(pairs, computed_in), None) is None


def differing(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]], computed_in: torch.dtype | None = None
) -> Iterator[int]:
    """Which of the pairs, by number, keep `are_close` from holding."""
    least = 0.0 if computed_in is None else _TOLERANCE[computed_in]
    sizes = [_norm(expected) if expected is not None and has_rounding(expected) else 0.0 for _, expected in pairs]
    everything = _NEGLIGIBLE * math.hypot(*sizes)
    for index, ((found, expected), size) in enumerate(zip(pairs, sizes, strict=True)):
        if not _is_close(found, expected, max(size, everything), least):
            yield index


def _is_close(found: Tensor | None, expected: Tensor | None, scale: float, least: float) -> bool:
    if found is None or expected is None:
        return found is expected
    if found.shape != expected.shape or not has_rounding(expected):
        return torch.equal(found, expected)
    found, expected = found.detach(), expected.detach()
    allowed = max(least, _TOLERANCE.get(expected.dtype, _TOLERANCE_OF_OTHERS)) * scale
    difference = _plain_norm(found - expected)
    if math.isfinite(difference):
        return difference <= allowed
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    return _norm(_finite(found) - _finite(expected)) <= allowed


def _norm(tensor: Tensor) -> float:
    """The Euclidean norm of what is finite in it."""
    norm = _plain_norm(tensor.detach())
    # A look at every number is dear, and where one is not finite the norm is not.
    return norm if math.isfinite(norm) else _plain_norm(_finite(tensor))


def _plain_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _finite(tensor: Tensor) -> Tensor:
    return tensor.detach().nan_to_num(0.0, 0.0, 0.0)


def has_rounding(value: Any) -> bool:
    """Whether it is a tensor of numbers that are rounded."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
