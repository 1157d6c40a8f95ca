"""The arguments of a plain function: their tensors, and which of them are differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradwire.user_values import normalize
from gradwire_proto.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class ArgumentTree:
    """How arguments nest what is differentiated.

    differentiated: for each of argnums, the indices of its tensors in the batch; looks: their types and shapes.
    """

    trees: tuple[pytree.TreeSpec, ...]
    differentiated: tuple[tuple[int, ...], ...]
    looks: Mapping[int, tuple[torch.dtype, tuple[int, ...]]]
    one: bool

    def nest(self, flat: Sequence[Any]) -> Any:
        """One thing for each tensor that is differentiated, as torch.func nests them: a tuple for several argnums."""
        remaining = iter(flat)
        nested = tuple(
            pytree.tree_unflatten([next(remaining) for _ in indices], tree)
            for indices, tree in zip(self.differentiated, self.trees, strict=True)
        )
        return nested[0] if self.one else nested


def tensor_leaves(args: Any) -> tuple[Tensor, ...]:
    """The tensors and arrays among nested arguments, in order, as detached tensors."""
    found = (normal_leaf(leaf, i) for i, leaf in enumerate(pytree.tree_leaves(args)))
    return tuple(leaf for leaf in found if isinstance(leaf, Tensor))


def normal_leaf(leaf: Any, index: int) -> Any:
    """A tensor or array among the arguments as a detached tensor; anything else as it is."""
    return normalize(leaf, f"args, leaf {index}") if isinstance(leaf, (Tensor, np.ndarray)) else leaf


def check_argnums(argnums: Any, count: int) -> tuple[int, ...]:
    """The positions that `argnums` names among `count` positional arguments, each from 0.

    Raises InvalidArgument ARGNUMS_INVALID for what torch.func refuses: neither an int nor a tuple of ints, one out of
    range, the same argument twice, none at all. What the arguments hold is not looked at.
    """
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not all(isinstance(number, int) for number in numbers):
        raise _wrong_argnums(argnums, f"expected an int or a tuple of ints, got a {type(argnums).__qualname__}")
    if not numbers:
        raise _wrong_argnums(argnums, "expected at least one")
    for number in numbers:
        if not -count <= number < count:
            raise _wrong_argnums(argnums, f"the function was given {count} positional arguments")
    positions = tuple(number % count for number in numbers)
    if len(set(positions)) < len(positions):
        raise _wrong_argnums(argnums, "the same argument is named twice")
    return positions


def argument_tree(args: tuple[Any, ...], argnums: int | tuple[int, ...]) -> ArgumentTree:
    """What `argnums` names. Raises InvalidArgument ARGNUMS_INVALID, also where that cannot be differentiated."""
    positions = check_argnums(argnums, len(args))
    trees, differentiated, looks = [], [], {}
    first = [0]
    for argument in args:
        first.append(first[-1] + len(tensor_leaves(argument)))
    for position in positions:
        leaves, tree = pytree.tree_flatten(args[position])
        tensors = tensor_leaves(args[position])
        if len(tensors) != len(leaves) or not all(t.is_floating_point() or t.is_complex() for t in tensors):
            raise _wrong_argnums(argnums, f"argument {position} must hold floating point tensors and nothing else")
        indices = tuple(range(first[position], first[position + 1]))
        trees.append(tree)
        differentiated.append(indices)
        looks |= {i: (tensor.dtype, tuple(tensor.shape)) for i, tensor in zip(indices, tensors, strict=True)}
    return ArgumentTree(
        trees=tuple(trees), differentiated=tuple(differentiated), looks=looks, one=isinstance(argnums, int)
    )


def _wrong_argnums(argnums: Any, why: str) -> InvalidArgument:
    return InvalidArgument(f"argnums={argnums!r}: {why}", field="argnums", reason="ARGNUMS_INVALID")
