"""One exported graph with what its inputs are bound to: it runs here, and it encodes for the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from gradwire.graph_encoding import clean, encode
from gradwire.tracing import Traced, trace
from gradwire.user_values import dtype_name
from gradwire_proto.errors import ExportError
from gradwire_proto.graph_writes import written_inputs
from gradwire_proto.values import Graph, GraphInput, StateTensor

_SMALL_CONSTANT = 1 << 16


@dataclass(kw_only=True)
class Constants:
    """The tensors that graphs of one program closed over, by the names that they get."""

    prefix: str
    known: Mapping[str, Tensor]
    added: dict[str, Tensor] = field(default_factory=dict)

    def name(self, tensor: Tensor) -> str:
        """The name of a closed-over tensor; one that equals it is shared."""
        tensor = tensor.detach()
        for name, other in (*self.known.items(), *self.added.items()):
            if _equal(tensor, other):
                return name
        name = f"{self.prefix}{len(self.added)}"
        self.added[name] = tensor
        return name

    def specs(self) -> tuple[StateTensor, ...]:
        """The added constants, as a program lists them."""
        return tuple(
            StateTensor(name=name, role="constant", dtype=dtype_name(t.dtype), shape=tuple(t.shape))
            for name, t in self.added.items()
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.added[name] if name in self.added else self.known[name]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return one.data_ptr() == other.data_ptr() or (one.numel() <= _SMALL_CONSTANT and torch.equal(one, other))


@dataclass(frozen=True, kw_only=True)
class TracedGraph:
    """`bindings`: what each input is bound to. `bound`: the live tensors among them, None for leaves."""

    module: fx.GraphModule
    graph: Graph
    bindings: tuple[GraphInput, ...]
    bound: tuple[Tensor | None, ...]
    written: tuple[str, ...]

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """Run it here, on the leaves that it takes, in the order in which they were traced."""
        remaining = iter(leaves)
        # The service's default; a factory that followed another one would show here.
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return list(self.module(*[next(remaining) if tensor is None else tensor for tensor in self.bound]))
        finally:
            torch.set_default_dtype(usual)


def trace_graph(
    function: Callable[..., Sequence[Any]],
    module: nn.Module | None,
    leaves: Sequence[tuple[GraphInput, Tensor, bool]],
    *,
    state: Mapping[str, Tensor],
    constants: Constants,
    operators: dict[str, str],
) -> TracedGraph:
    """Export `function` of tensors, which runs `module`.

    leaves: for each tensor what it is bound to, an example of it, and whether its dimension 0 may vary.
    state: the module's tensors by name; tensors that are not in it become constants.
    """
    examples = [tensor.detach().clone() for _, tensor, _ in leaves]
    exported = trace(function, module, examples, [has_rows for _, _, has_rows in leaves])
    clean(exported.graph_module)
    bindings, bound = _bind(exported, [binding for binding, _, _ in leaves], state, constants)
    graph = encode(exported.graph_module, operators)
    written = _written(graph, bindings, operators, state)
    return TracedGraph(
        module=exported.graph_module, graph=graph, bindings=tuple(bindings), bound=tuple(bound), written=written
    )


def _bind(
    exported: ExportedProgram, leaves: Sequence[GraphInput], state: Mapping[str, Tensor], constants: Constants
) -> tuple[list[GraphInput], list[Tensor | None]]:
    remaining = iter(leaves)
    bindings: list[GraphInput] = []
    bound: list[Tensor | None] = []
    for spec in exported.graph_signature.input_specs:
        target = str(spec.target)
        name = target.removeprefix(Traced.PREFIX)
        if spec.kind is InputKind.USER_INPUT:
            bindings.append(next(remaining))
            bound.append(None)
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ExportError(f"the graph takes {target!r}, a {spec.kind.name.lower()}, which no message can carry")
        tensor: Any = state.get(name) if spec.kind is not InputKind.CONSTANT_TENSOR else None
        if tensor is None:
            tensor = exported.constants.get(target)
            tensor = exported.state_dict[target] if tensor is None else tensor
            name = constants.name(tensor)
        bindings.append(GraphInput("tensor", name))
        # As it lies on the service.
        bound.append(tensor if tensor.is_contiguous() else tensor.contiguous())
    return bindings, bound


def _written(
    graph: Graph, bindings: Sequence[GraphInput], operators: Mapping[str, str], state: Mapping[str, Tensor]
) -> tuple[str, ...]:
    names = [bindings[i].key for i in written_inputs(graph, operators) if bindings[i].kind == "tensor"]
    for name in names:
        if name not in state:
            raise ExportError(
                "the forward changes a tensor in place that is no buffer of the module: register it as one",
                reason="EXPORT_FAILED",
            )
    return tuple(str(name) for name in names)
