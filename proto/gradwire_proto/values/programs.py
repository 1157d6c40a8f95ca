"""What a model computes: graphs and what they are bound to, or an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gradwire_proto.values.tensors import Value

ROWS = "rows"
"""The symbol of the batch size: dimension 0 of every leaf that has rows."""


@dataclass(frozen=True, slots=True)
class NodeRef:
    """The result of an earlier node, or an input of the graph."""

    name: str


@dataclass(frozen=True, slots=True)
class SubgraphRef:
    """A subgraph of the graph that holds the node."""

    name: str


@dataclass(frozen=True, slots=True)
class FunctionRef:
    """A custom function of the graph that holds the node."""

    name: str


@dataclass(frozen=True, slots=True)
class DTypeRef:
    """An element type as an operator's argument: "float32"."""

    name: str


@dataclass(frozen=True, slots=True)
class LayoutRef:
    """A layout as an operator's argument: "strided"."""

    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormatRef:
    """A memory format as an operator's argument: "contiguous", "preserve", "channels_last" or "channels_last_3d"."""

    name: str


@dataclass(frozen=True, slots=True)
class RankDevice:
    """Stands for the device of the rank that runs the graph."""


Reference: TypeAlias = NodeRef | SubgraphRef | FunctionRef | DTypeRef | LayoutRef | MemoryFormatRef | RankDevice

Argument: TypeAlias = "Reference | None | bool | int | float | complex | str | list[Argument]"


@dataclass(frozen=True, slots=True)
class Node:
    """One call of an operator."""

    name: str
    operator: str
    arguments: tuple[Argument, ...] = ()
    keyword_arguments: Mapping[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graph:
    """Operators in the order in which they run. Outputs are flat."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Argument, ...]
    subgraphs: Mapping[str, Graph] = field(default_factory=dict)
    functions: Mapping[str, CustomFunction] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomFunction:
    """A function with its own backward.

    forward: inputs -> results, then what backward reads. backward: gradients of `differentiable_results`, then what
    forward gave behind its results -> gradients of `differentiable_inputs`, each a tensor or None. Indices rise.
    """

    forward: Graph
    backward: Graph
    results: int
    differentiable_results: tuple[int, ...]
    differentiable_inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeafRef:
    """A leaf of a nested structure, by its index."""

    index: int


Structure: TypeAlias = "LeafRef | tuple[Structure, ...] | list[Structure] | dict[str, Structure] | None"
"""How leaves are nested."""


def unflatten(structure: Structure, flat: list[Any]) -> Any:
    """Nest `flat` as `structure` says."""
    if isinstance(structure, LeafRef):
        return flat[structure.index]
    if isinstance(structure, tuple):
        return tuple(unflatten(item, flat) for item in structure)
    if isinstance(structure, list):
        return [unflatten(item, flat) for item in structure]
    if isinstance(structure, dict):
        return {key: unflatten(item, flat) for key, item in structure.items()}
    return None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The type and shape that a tensor must have. A dimension is a size, or the name of a symbol."""

    dtype: str
    shape: tuple[int | str, ...]

    @property
    def has_rows(self) -> bool:
        """Whether dimension 0 is the batch's rows."""
        return bool(self.shape) and self.shape[0] == ROWS


@dataclass(frozen=True, slots=True)
class ConstantSpec:
    """A constant that the graph has baked in: the batch must bring the same."""

    value: bool | int | float | str


Leaf: TypeAlias = "TensorSpec | ConstantSpec"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A size that may vary. `max` None: no bound."""

    name: str
    min: int = 0
    max: int | None = None


@dataclass(frozen=True, slots=True)
class GraphInput:
    """What an input of a graph is bound to. `kind`: "tensor", "input", "output" or "target"; `key`: name or leaf."""

    kind: str
    key: str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One exported graph of a program: train or eval mode, one family of shapes.

    `graph` is None in descriptions that a server gives back (see `ModelInfo.variants`). `weight_graph`: what rows weigh
    in the loss.
    """

    name: str
    training: bool
    graph: Graph | None
    graph_inputs: tuple[GraphInput, ...]
    input_structure: Structure
    input_leaves: tuple[Leaf, ...]
    output_structure: Structure
    symbols: tuple[Symbol, ...] = ()
    loss_graph: Graph | None = None
    loss_graph_inputs: tuple[GraphInput, ...] = ()
    target_structure: Structure = None
    target_leaves: tuple[Leaf, ...] = ()
    weight_graph: Graph | None = None
    weight_graph_inputs: tuple[GraphInput, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor of a program. `role`: "parameter", "buffer", "temporary_buffer" or "constant".

    `may_train`: the graphs give the gradient of a parameter that requires none for now, so that it can be unfrozen.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool = False
    alias_of: str | None = None
    may_train: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a model computes: graphs over the same tensors. `operators`: overload name -> schema."""

    torch_version: str
    tensors: tuple[StateTensor, ...]
    variants: tuple[Variant, ...]
    operators: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureSpec:
    """A module that the ranks build by name: a class of torch.nn or of transformers, with its keyword arguments.

    A module among the arguments is a dict {"name": ..., "config": {...}}. weights: the folder of its first weights,
    below the one that the service allows; None for weights by the model's seed.
    """

    name: str
    config: Mapping[str, Value] = field(default_factory=dict)
    weights: str | None = None
