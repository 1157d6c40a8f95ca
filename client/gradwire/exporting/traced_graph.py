"""One exported graph with what its inputs are bound to: it runs here, and it encodes for the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from gradwire.exporting.graph_encoding import clean, encode
from gradwire.exporting.open_sizes import OpenSizes
from gradwire.exporting.tracing import Openings, Traced, trace
from gradwire.user_values import dtype_name
from gradwire_proto.errors import ExportError
from gradwire_proto.function_replay import ReplayedFunction
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
    """`bindings`: what each input is bound to. `bound`: the live tensors among them, None for leaves.

    `sizes`: those of the leaves and outputs, in the trace.
    """

    module: fx.GraphModule
    graph: Graph
    bindings: tuple[GraphInput, ...]
    bound: tuple[Tensor | None, ...]
    written: tuple[str, ...]
    sizes: OpenSizes

    @property
    def leaves(self) -> list[GraphInput]:
        """The leaves among what its inputs are bound to, in the order of `sizes.leaves`."""
        return [binding for binding, tensor in zip(self.bindings, self.bound, strict=True) if tensor is None]

    @property
    def has_functions(self) -> bool:
        """Whether functions with a backward of their own are among its operators."""
        return any(isinstance(each, ReplayedFunction) for each in self.module.modules())

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """Run it here, on the leaves that it takes, in the order in which they were traced."""
        remaining = iter(leaves)
        # As tensors lie on the service.
        taken = [next(remaining) if tensor is None else tensor.contiguous() for tensor in self.bound]
        # The service's default; a factory that followed another one would show here.
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            outputs = list(self.module(*taken))
        finally:
            torch.set_default_dtype(usual)
        for binding, tensor, given in zip(self.bindings, self.bound, taken, strict=True):
            if tensor is not None and given is not tensor and binding.key in self.written:
                tensor.data.copy_(given.detach())
        return outputs


def trace_graph(
    function: Callable[..., Sequence[Any]],
    module: nn.Module | None,
    leaves: Sequence[tuple[GraphInput, Tensor, Openings]],
    *,
    state: Mapping[str, Tensor],
    constants: Constants,
    operators: dict[str, str],
    subject: str,
    trained: Mapping[str, Tensor] | None = None,
    restore: Callable[[], None] = lambda: None,
    precision: str = "fp32",
) -> TracedGraph:
    """Export `function` of tensors, which runs `module`.

    leaves: for each tensor what it is bound to, an example of it, and which of its dimensions may vary.
    state: the module's tensors by name; tensors that are not in it become constants.
    subject: what errors call the function. trained: tensors by name that must not become constants. restore: puts the
    module back as it was, where it has to be run once more. precision: at which it will run.
    """
    examples = [tensor.detach().clone() for _, tensor, _ in leaves]
    differentiable = [
        binding.kind != "target" and (tensor.is_floating_point() or tensor.is_complex())
        for binding, tensor, _ in leaves
    ]
    openings = [opening for _, _, opening in leaves]
    exported = trace(function, module, examples, openings, differentiable, restore, precision)
    sizes = OpenSizes.of(exported)
    _refuse_torch_func(exported.graph_module, subject)
    clean(exported.graph_module)
    bindings, bound = _bind(exported, [binding for binding, _, _ in leaves], state, constants)
    _refuse_trained(bindings, bound, trained or {}, subject)
    graph = encode(exported.graph_module, operators)
    written = _written(graph, bindings, operators, state, subject)
    return TracedGraph(
        module=exported.graph_module,
        graph=graph,
        bindings=tuple(bindings),
        bound=tuple(bound),
        written=written,
        sizes=sizes,
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
        bound.append(tensor)
    return bindings, bound


def _refuse_torch_func(module: fx.GraphModule, subject: str) -> None:
    for node in (node for each in module.modules() if isinstance(each, fx.GraphModule) for node in each.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__module__", "").startswith("torch._functorch"):
            raise ExportError(
                f"torch.func (grad, vmap, jvp ...) inside {subject} cannot be exported: write it with plain operators",
                reason="OPERATOR_NOT_ALLOWED",
            )


def _refuse_trained(
    bindings: Sequence[GraphInput], bound: Sequence[Tensor | None], trained: Mapping[str, Tensor], subject: str
) -> None:
    places = {tensor.data_ptr(): name for name, tensor in trained.items() if tensor.numel()}
    for binding, tensor in zip(bindings, bound, strict=True):
        if binding.kind == "tensor" and tensor is not None and tensor.numel() and tensor.data_ptr() in places:
            name = places[tensor.data_ptr()]
            raise ExportError(
                f"{subject} reads {name!r} of the module, which training changes, and would keep its value of now: let"
                " the module return what the loss needs of it, or compute the loss in the module and return it"
                " (loss=None)",
                field=name,
                reason="EXPORT_LOSS_READS_MODULE",
            )


def _written(
    graph: Graph,
    bindings: Sequence[GraphInput],
    operators: Mapping[str, str],
    state: Mapping[str, Tensor],
    subject: str,
) -> tuple[str, ...]:
    names = [bindings[i].key for i in written_inputs(graph, operators) if bindings[i].kind == "tensor"]
    for name in names:
        if name not in state:
            raise ExportError(
                f"{subject} changes a tensor that is no buffer of the module, and nobody would keep it on the service:"
                " register it as a buffer of the module, and change it in the module's forward",
                reason="EXPORT_FAILED",
            )
    return tuple(str(name) for name in names)
