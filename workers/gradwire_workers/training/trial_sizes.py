"""An example's leaves at other sizes than its own: what holds of a loss at one length need not hold at another.

A mask of positions, or a term that only long rows have, rests in all that is short. Where it begins nobody knows: what
is tried is longer than the example, and than the numbers that a graph compares with, as far as that is not dear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.values import ROWS, TensorSpec, Variant
from gradwire_workers.sharding import has_rows

_ALWAYS, _NAMED = 128, 1024
"""A length is tried up to so many where it is the only one, and sizes beyond numbers up to so many."""

Leaves = tuple[list[Any], list[Any]]
"""Inputs and targets."""


def at_other_sizes(
    variant: Variant, inputs: Sequence[Any], targets: Sequence[Any], numbers: Sequence[int]
) -> Leaves | None:
    """The leaves at the largest sizes that are tried; None where they are fixed.

    numbers: those that the variant's graphs compare something with.
    """
    specs = (*variant.input_leaves, *variant.target_leaves[: len(targets)])
    found: dict[str, int] = {}
    for spec, leaf in zip(specs, (*inputs, *targets), strict=True):
        if isinstance(spec, TensorSpec) and isinstance(leaf, Tensor):
            found |= {name: leaf.shape[place] for place, name in enumerate(spec.shape) if isinstance(name, str)}
    symbols = [each for each in variant.symbols if each.name in found and each.name != ROWS]
    # Each by another number, so that none is mistaken for another.
    sizes = {
        each.name: _largest(found[each.name], numbers, is_only=len(symbols) == 1) + index
        for index, each in enumerate(symbols)
    }
    sizes = {each.name: min(sizes[each.name], each.max or sizes[each.name]) for each in symbols}
    if all(sizes[name] == found[name] for name in sizes):
        return None
    resized = [_resized(leaf, spec, sizes) for leaf, spec in zip((*inputs, *targets), specs, strict=True)]
    return resized[: len(inputs)], resized[len(inputs) :]


def _largest(size: int, numbers: Sequence[int], *, is_only: bool) -> int:
    return max(2 * size + 1, _ALWAYS if is_only else 0, *(number + 2 for number in numbers if number <= _NAMED))


def _resized(leaf: Any, spec: Any, sizes: dict[str, int]) -> Any:
    """The leaf's content from its start, and again where it ends."""
    if not isinstance(leaf, Tensor) or not isinstance(spec, TensorSpec):
        return leaf
    for place, name in enumerate(spec.shape):
        if name in sizes and not (place == 0 and has_rows(spec)):
            chosen = torch.arange(sizes[name], device=leaf.device) % leaf.shape[place]
            leaf = leaf.index_select(place, chosen)
    return leaf
