"""The sizes of a trace: which torch.export left open, and what it took for granted of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._sympy.value_ranges import ValueRanges

Size = Any
"""A number, or the sympy expression of open sizes that it is."""


@dataclass(frozen=True, kw_only=True)
class OpenSizes:
    """leaves: the shape of each input that is no tensor of the module; outputs: of each output, None for no tensor.

    guards: what must hold of the open sizes for the graph to be right. ranges: of each, what it may be at all.
    """

    leaves: tuple[tuple[Size, ...], ...]
    outputs: tuple[tuple[Size, ...] | None, ...]
    guards: tuple[sympy.Basic, ...]
    ranges: Mapping[sympy.Symbol, ValueRanges[Any]]

    @classmethod
    def of(cls, exported: ExportedProgram) -> OpenSizes:
        """Those of a program just exported, before anything is taken from it."""
        nodes = list(exported.graph_module.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        kinds = [spec.kind for spec in exported.graph_signature.input_specs]
        leaves = [node.meta["val"] for node, kind in zip(inputs, kinds, strict=True) if kind is InputKind.USER_INPUT]
        outputs = [getattr(node, "meta", {}).get("val") for node in nodes[-1].args[0]]
        environment = next((size.node.shape_env for leaf in leaves for size in leaf.shape if _is_open(size)), None)
        if environment is None:
            guards, ranges = (), {}
        else:
            guards = tuple({environment.replace(guard.expr): None for guard in environment.guards})
            ranges = dict(environment.var_to_range)
        return cls(
            leaves=tuple(_shape(leaf) for leaf in leaves),
            outputs=tuple(_shape(output) if isinstance(output, Tensor) else None for output in outputs),
            guards=guards,
            ranges=ranges,
        )


def symbols_of(size: Size) -> set[sympy.Symbol]:
    """The open sizes that a size depends on."""
    return set() if isinstance(size, int) else {each for each in size.free_symbols if isinstance(each, sympy.Symbol)}


def _shape(tensor: Tensor) -> tuple[Size, ...]:
    sizes: tuple[Any, ...] = tuple(tensor.shape)
    return tuple(size.node.expr if _is_open(size) else int(size) for size in sizes)


def _is_open(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)
