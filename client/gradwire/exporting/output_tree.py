"""How a module nests its outputs: as the wire's structure, and back into the module's own types."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradwire_proto.errors import ExportError
from gradwire_proto.output_remedies import remedy
from gradwire_proto.values import LeafRef, Structure, Value, leaves


@dataclass(frozen=True, kw_only=True)
class OutputTree:
    """The tree of a module's outputs. `structure` numbers the leaves that are not None."""

    spec: pytree.TreeSpec
    is_none: tuple[bool, ...]
    structure: Structure

    @classmethod
    def of(cls, output: Any) -> tuple[OutputTree, list[Any]]:
        """(the tree, its leaves without None). Raises ExportError for a leaf that is no tensor and no constant."""
        flat, spec = pytree.tree_flatten(output)
        for leaf in flat:
            allowed = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str, type(None))
            if not isinstance(leaf, allowed):
                raise ExportError(
                    f"the module returns a {type(leaf).__module__}.{type(leaf).__qualname__}; expected tensors and"
                    " constants in tuples, lists, dicts, named tuples or types registered with torch's pytree"
                    + remedy(leaf),
                    reason="OUTPUT_UNSUPPORTED",
                )
        is_none = tuple(leaf is None for leaf in flat)
        numbers: list[int | None] = []
        for none in is_none:
            numbers.append(None if none else len(numbers) - numbers.count(None))
        tree = cls(spec=spec, is_none=is_none, structure=_structure(spec, iter(numbers)))
        return tree, [leaf for leaf in flat if leaf is not None]

    def rebuild(self, value: Value) -> Any:
        """The module's own kind of output for the wire's: tensors and constants nested as `structure`."""
        return self.unflatten([leaf for _, leaf in leaves(value)])

    def unflatten(self, flat: list[Any]) -> Any:
        """The module's own kind of output for leaves in order, without None."""
        remaining = iter(flat)
        return pytree.tree_unflatten([None if none else next(remaining) for none in self.is_none], self.spec)


def _structure(spec: pytree.TreeSpec, numbers: Any) -> Structure:
    if spec.is_leaf():
        number = next(numbers)
        return None if number is None else LeafRef(number)
    children = [_structure(child, numbers) for child in spec.children()]
    if spec.type is list:
        return children
    if isinstance(spec.type, type) and issubclass(spec.type, Mapping):
        return dict(zip(_keys(spec, len(children)), children, strict=True))
    return tuple(children)


def _keys(spec: pytree.TreeSpec, count: int) -> list[str]:
    """The keys of a mapping: torch's own dicts keep them in the context, others at best do."""
    context: Any = spec.context
    if spec.type is defaultdict:
        context = context[1]
    if spec.type in (dict, OrderedDict, defaultdict):
        return [str(key) for key in context]
    candidates = [context, *context] if isinstance(context, (tuple, list)) else [context]
    for candidate in candidates:
        if isinstance(candidate, (tuple, list)) and len(candidate) == count:
            return [str(key) for key in candidate]
    return [str(index) for index in range(count)]
