"""The values that the code passes around: frozen, plain, and free of protobuf, torch and grpc.

`codec` turns them into messages and back; `tensors` turns `TensorData` into torch tensors and back. Everything between
the edges speaks these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

ITEM_SIZE: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element, by dtype. The names are torch's; these are the dtypes that the service speaks."""

ROWS = "rows"
"""The symbol of the batch size: dimension 0 of every leaf that has rows."""


# --- tensors and nested values ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes in a file that the service made in its own private folder (usually in shared memory)."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Handle:
    """A tensor that travels apart: `uploads/{upload}/tensors/{index}` or `downloads/{download}/tensors/{index}`."""

    name: str


Bytes: TypeAlias = "bytes | bytearray | memoryview"


@dataclass(frozen=True, slots=True)
class TensorData:
    """A dense tensor: dtype name, shape, and its row-major little-endian bytes or where to find them."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes | Segment | Handle

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


Value: TypeAlias = "TensorData | tuple[Value, ...] | list[Value] | dict[str, Value] | None | bool | int | float | str"
"""A tensor, or a nested arrangement of tensors and constants. In the SDK the tensors are torch's."""

NamedTensors: TypeAlias = "dict[str, TensorData]"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for every tensor and constant in a nested value, depth first; None is structure, no leaf.

    Paths read like field paths: `inputs`, `inputs[0]`, `inputs.mask`.
    """
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif value is not None:
        yield path, value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting with `function` applied to every leaf."""
    if isinstance(value, tuple):
        return tuple(map_leaves(function, item) for item in value)
    if isinstance(value, list):
        return [map_leaves(function, item) for item in value]
    if isinstance(value, dict):
        return {key: map_leaves(function, item) for key, item in value.items()}
    return None if value is None else function(value)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a program is fed with. `inputs`: a tensor, a tuple (positional) or a dict (keyword); nested where needed."""

    inputs: Value
    targets: Value = None


# --- programs -----------------------------------------------------------------------------------------------------


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

    `graph` is None in descriptions that a server gives back (see `ModelInfo.variants`).
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor of a program. `role`: "parameter", "buffer", "temporary_buffer" or "constant"."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool = False
    alias_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a model computes: graphs over the same tensors. `operators`: overload name -> schema."""

    torch_version: str
    tensors: tuple[StateTensor, ...]
    variants: tuple[Variant, ...]
    operators: Mapping[str, str]


# --- models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TorchLossSpec:
    """A loss of torch.nn.functional, by name, with its keyword arguments."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GraphLossSpec:
    """Each training variant carries its loss_graph."""


@dataclass(frozen=True, slots=True)
class OutputLossSpec:
    """The program returns the loss itself, in this leaf of its outputs."""

    output_leaf: int


LossSpec: TypeAlias = "TorchLossSpec | GraphLossSpec | OutputLossSpec"


@dataclass(frozen=True, slots=True)
class ParameterGroupSpec:
    """The parameters that `pattern`, a name or a glob, matches, and the options in which they differ."""

    pattern: str
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """A schedule of torch.optim.lr_scheduler, by class name, with its keyword arguments.

    `schedulers`: what a SequentialLR or ChainedScheduler is made of.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)
    schedulers: tuple[ScheduleSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer of torch.optim, by class name, with its keyword arguments.

    `groups`: parameters that it treats apart; all others come first, as a group of their own.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)
    groups: tuple[ParameterGroupSpec, ...] = ()
    schedule: ScheduleSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a client asks for. `device`: "auto", "cpu" or "cuda"; `on_nan`: "report" or "refuse".

    `clip_grad_norm`, `clip_grad_value`: bounds of the gradients of an update, of their norm and of each element.
    """

    program: Program
    loss: LossSpec | None = None
    optimizer: OptimizerSpec | None = None
    workers: int = 1
    device: str = "auto"
    gpus_per_worker: float = 0.0
    seed: int = 0
    on_nan: str = "report"
    require_sharding: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None


@dataclass(frozen=True, slots=True)
class Sharding:
    """How batches are spread over the ranks. `mode`: "rows" or "whole"; `reason`: why, in words."""

    mode: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as the service describes it. `state`: "creating", "ready", "failed" or "deleting".

    `last_error` is the error that failed the model or the last one that a command met. `rank_rows` are the rows that
    each rank computed in the last command that had a batch. Lists leave `tensors` and `variants` empty.
    """

    id: str
    state: str
    step: int
    workers: int
    sharding: Sharding | None
    num_parameters: int
    optimizer: OptimizerSpec | None
    loss: LossSpec | None
    labels: Mapping[str, str]
    created_at: float
    last_error: str | None = None
    device: str = "cpu"
    seed: int = 0
    on_nan: str = "report"
    tensors: tuple[StateTensor, ...] = ()
    variants: tuple[Variant, ...] = ()
    rank_rows: tuple[int, ...] = ()
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """A function of tensors, without state. `program` None: the service knows the digest already."""

    digest: str
    program: Program | None
    tensors: NamedTensors
    output_leaf: int = 0


# --- commands and results -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientQuery:
    """What compute_gradients should return. `wrt`: names or globs, None for all that require gradients."""

    wrt: tuple[str, ...] | None = None
    input_gradients: bool = False
    outputs: bool = False
    training: bool = True
    seed: int | None = None
    gradient_dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of a call went, in seconds. See the message of the same name for each part."""

    queue: float = 0.0
    transfer: float = 0.0
    compute: float = 0.0
    all_reduce: float = 0.0
    optimizer: float = 0.0
    recovery: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a training command answers. `loss` is the loss over the whole batch; None where none was computed.

    `lr`: the first parameter group's, of the update, or of the next one where there was none. `grad_norm`: of all
    gradients together, before they were clipped; None where the model does not clip.
    """

    loss: float | None
    step: int
    num_examples: int = 0
    grad_norm: float | None = None
    lr: float | None = None
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientResult:
    """What compute_gradients answers: `gradients` by name, `input_gradients` nested as the inputs, `outputs`."""

    loss: float
    step: int
    num_examples: int
    gradients: Mapping[str, Any]
    input_gradients: Any = None
    outputs: Any = None
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """What forward answers."""

    outputs: Any
    step: int
    timing: Timing = Timing()
    rank_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo:
    """What became of a command. `state`: "running", "applied" or "not_applied"."""

    name: str
    state: str
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the service takes at most. Each is a setting of the server, and an error that names it."""

    message_bytes: int = 64 << 20
    tensor_bytes: int = 16 << 30
    graph_nodes: int = 100_000
    model_bytes: int = 64 << 30
    models: int = 256
    requests_in_flight: int = 1024
    requests_per_model: int = 256
    held_bytes: int = 16 << 30
    variants: int = 64
    held_seconds: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """Versions, capacity and limits of a service."""

    version: str
    torch_version: str
    workers: int
    free_workers: int
    gpus: float
    limits: Limits
