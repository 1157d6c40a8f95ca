"""An fx graph from torch.export -> the contract's graph, cleaned of what belongs to the machine that made it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gradwire.exporting.function_rules import refuse_writes_in_backward, refused
from gradwire.user_values import dtype_name
from gradwire_proto.conditions import run_cond
from gradwire_proto.errors import ExportError
from gradwire_proto.function_replay import ReplayedFunction, call_function
from gradwire_proto.graph_writes import parse_schema
from gradwire_proto.operators import (
    AUTOCAST_REGION,
    COND,
    CUSTOM_FUNCTION,
    allowed_operators,
    has_schema,
    name_of,
    schema_of,
)
from gradwire_proto.values import (
    ITEM_SIZE,
    Argument,
    CustomFunction,
    DTypeRef,
    FunctionRef,
    Graph,
    LayoutRef,
    MemoryFormatRef,
    Node,
    NodeRef,
    RankDevice,
    SubgraphRef,
)

aten = torch.ops.aten

_MEMORY_FORMATS = {
    torch.contiguous_format: "contiguous",
    torch.preserve_format: "preserve",
    torch.channels_last: "channels_last",
    torch.channels_last_3d: "channels_last_3d",
}

# Memory that was never written may hold anything, zeros too; ranks do not hand out theirs.
_ZEROED: dict[Any, Any] = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}

# What PyTorch calls inside for these: the same numbers, without their checks.
_CHECKED: dict[Any, Any] = {
    aten._unsafe_view.default: aten.view.default,
    aten._unsafe_index.Tensor: aten.index.Tensor,
    aten._unsafe_index_put.default: aten.index_put.default,
}


_GRAPH_CALLS: dict[Any, str] = {call_function: CUSTOM_FUNCTION, run_cond: COND}


def clean(module: fx.GraphModule) -> None:
    """Edit an exported graph in place: what is left runs as before on any machine.

    Drops checks of metadata and sizes nobody reads, zero-fills what torch would leave unwritten, and writes out the
    element type of factories that follow torch.get_default_dtype().
    """
    for graph_module in [each for each in module.modules() if isinstance(each, fx.GraphModule)]:
        for node in reversed(list(graph_module.graph.nodes)):
            if node.op == "call_function":
                _clean(node)
        graph_module.recompile()


def _clean(node: fx.Node) -> None:
    unread = node.target in (operator.getitem, aten.sym_size.int) and not node.users
    if unread or node.target is aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
        return
    if node.target is torch.ops.higher_order.cond:
        # torch's own traces its branches again at every call.
        node.target = run_cond
        return
    if node.target in _ZEROED:
        node.target = _ZEROED[node.target]
        if node.target is not aten.zeros_like.default:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}
    node.target = _CHECKED.get(node.target, node.target)
    schema: Any = getattr(node.target, "_schema", None)
    taken = schema.arguments if schema else []
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("pin_memory", "generator")}
    value = node.meta.get("val")
    # A factory: told a layout and a device, it takes no tensor to copy the element type from.
    is_factory = {"dtype", "layout", "device"} <= {a.name for a in taken} and not any(
        "Tensor" in str(a.type) for a in taken
    )
    if is_factory and node.kwargs.get("dtype") is None and isinstance(value, torch.Tensor):
        node.kwargs = {**node.kwargs, "dtype": value.dtype}


def encode(module: fx.GraphModule, operators: dict[str, str]) -> Graph:
    """The graph of a cleaned module; the schema of each of its operators is put into `operators`.

    Raises ExportError OPERATOR_NOT_ALLOWED for an operator that ranks do not run, and EXPORT_FAILED for an argument
    that the contract cannot express.
    """
    return _Encoder(module, operators).encode()


class _Encoder:
    def __init__(self, module: fx.GraphModule, operators: dict[str, str]) -> None:
        self._module = module
        self._operators = operators
        self._subgraphs: dict[str, Graph] = {}
        self._functions: dict[str, CustomFunction] = {}
        self._nodes: list[Node] = []

    def encode(self) -> Graph:
        inputs: list[str] = []
        outputs: Sequence[Any] = ()
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                inputs.append(node.name)
            elif node.op == "output":
                outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            elif node.op == "call_function":
                self._nodes.append(self._node(node))
            elif node.op == "get_attr":
                self._subgraph(node)
        encoded = tuple(self._argument(item, None) for item in outputs)
        return Graph(tuple(inputs), tuple(self._nodes), encoded, self._subgraphs, self._functions)

    def _subgraph(self, node: fx.Node) -> None:
        attribute = getattr(self._module, str(node.target))
        if isinstance(attribute, ReplayedFunction):
            self._functions[node.name] = self._function(attribute)
            return
        if not isinstance(attribute, fx.GraphModule):
            raise ExportError(f"the graph reads {node.target!r}, which is no part of it{_place(node)}")
        self._subgraphs[node.name] = encode(attribute, self._operators)

    def _function(self, function: ReplayedFunction) -> CustomFunction:
        origin, forward, backward = function.origin, function.forward_graph, function.backward_graph
        assert isinstance(forward, fx.GraphModule) and isinstance(backward, fx.GraphModule)
        try:
            encoded = CustomFunction(
                forward=encode(forward, self._operators),
                backward=encode(backward, self._operators),
                results=function.results,
                differentiable_results=function.differentiable_results,
                differentiable_inputs=function.differentiable_inputs,
            )
        except ExportError as error:
            raise refused(origin, f"cannot be sent: {error.message}", reason=error.reason) from error
        refuse_writes_in_backward(origin, encoded, self._operators)
        return encoded

    def _node(self, node: fx.Node) -> Node:
        name = _GRAPH_CALLS[node.target] if node.target in _GRAPH_CALLS else name_of(node.target)
        if name not in allowed_operators():
            raise ExportError(
                f"operator {name} is not one that the service runs{_place(node)}", reason="OPERATOR_NOT_ALLOWED"
            )
        arguments = [self._argument(item, node) for item in node.args]
        if name == AUTOCAST_REGION:
            arguments[0] = RankDevice()
        if has_schema(name):
            self._operators[name] = schema_of(name)
            arguments, keywords = self._without_machine(name, arguments, node)
        else:
            keywords = {}
        return Node(node.name, name, tuple(arguments), keywords)

    def _without_machine(
        self, name: str, arguments: list[Argument], node: fx.Node
    ) -> tuple[list[Argument], dict[str, Argument]]:
        """Arguments that say nothing of this machine's devices and its generators."""
        parameters = [parameter.name for parameter in parse_schema(self._operators[name])]
        for index, parameter in enumerate(parameters[: len(arguments)]):
            if parameter == "pin_memory":
                arguments[index] = None
        return arguments, {key: self._argument(value, node) for key, value in node.kwargs.items()}

    def _argument(self, value: Any, node: fx.Node | None) -> Argument:
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                return NodeRef(value.name)
            return FunctionRef(value.name) if value.name in self._functions else SubgraphRef(value.name)
        if isinstance(value, (list, tuple)):
            return [self._argument(item, node) for item in value]
        if isinstance(value, torch.device):
            return RankDevice()
        if isinstance(value, torch.dtype) and dtype_name(value) in ITEM_SIZE:
            return DTypeRef(dtype_name(value))
        if isinstance(value, torch.memory_format):
            return MemoryFormatRef(_MEMORY_FORMATS[value])
        if value is torch.strided:
            return LayoutRef("strided")
        if value is None or isinstance(value, (bool, float, complex, str)):
            return value
        if isinstance(value, int) and -(2**63) <= value < 2**63:
            return value
        raise ExportError(f"{value!r} cannot be an argument of an operator on the service{_place(node)}")


def _place(node: fx.Node | None) -> str:
    """ " at file:line" of the user's line that made the node, where torch knows it."""
    if node is None:
        return ""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")
    ]
    ours = [line for line in lines if "/torch/" not in line and "/gradwire/" not in line]
    parts = ours[-1].split('"') if ours else []
    return f" at {parts[1]}:{parts[2].split('line ')[1].split(',')[0]}" if len(parts) > 2 else ""
