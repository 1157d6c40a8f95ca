"""A graph value -> fx.GraphModule. Operators come from the allowlist; no name that a client sent reaches any code."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gradwire_proto.conditions import run_cond
from gradwire_proto.function_replay import ReplayedFunction, call_function
from gradwire_proto.operators import AUTOCAST_REGION, COND, CUSTOM_FUNCTION, REGIONS, has_schema, resolve
from gradwire_proto.values import (
    Argument,
    CustomFunction,
    DTypeRef,
    FunctionRef,
    Graph,
    LayoutRef,
    Limits,
    MemoryFormatRef,
    Node,
    NodeRef,
    RankDevice,
    SubgraphRef,
)
from gradwire_workers.programs import batch_norm
from gradwire_workers.programs.arithmetic import bounded
from gradwire_workers.programs.checked_operators import checked
from gradwire_workers.programs.regions import run_with_autocast, run_with_grad_mode
from gradwire_workers.programs.size_check import BackwardSizes

_MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_LAYOUTS = {"strided": torch.strided}


def build_graph(graph: Graph, device: torch.device, tensor_bytes: int = Limits().tensor_bytes) -> fx.GraphModule:
    """A module that runs a checked graph on `device`; called with the graph's inputs, it returns a tuple of outputs.

    tensor_bytes: how large a tensor may be that an operator makes for itself.
    Each call node's `meta["operator"]` is the operator's name in the allowlist.
    """
    return _Builder(graph, device, tensor_bytes).build()


def _build_function(function: CustomFunction, device: torch.device, tensor_bytes: int) -> ReplayedFunction:
    made = ReplayedFunction(
        build_graph(function.forward, device, tensor_bytes),
        build_graph(function.backward, device, tensor_bytes),
        results=function.results,
        differentiable_results=function.differentiable_results,
        differentiable_inputs=function.differentiable_inputs,
    )
    made.before_backward = BackwardSizes(tensor_bytes)
    return made


class _Builder:
    def __init__(self, graph: Graph, device: torch.device, tensor_bytes: int) -> None:
        self._source = graph
        self._device = device
        self._tensor_bytes = tensor_bytes
        self._graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}
        self._subgraphs: dict[str, str] = {}
        self._functions: dict[str, str] = {}

    def build(self) -> fx.GraphModule:
        root: dict[str, Any] = {}
        for index, (name, subgraph) in enumerate(self._source.subgraphs.items()):
            self._subgraphs[name] = f"subgraph_{index}"
            root[f"subgraph_{index}"] = build_graph(subgraph, self._device, self._tensor_bytes)
        for index, (name, function) in enumerate(self._source.functions.items()):
            self._functions[name] = f"function_{index}"
            root[f"function_{index}"] = _build_function(function, self._device, self._tensor_bytes)
        # Names of our own: the client's never become Python identifiers.
        for index, name in enumerate(self._source.inputs):
            self._nodes[name] = self._graph.placeholder(f"input_{index}")
        for index, node in enumerate(self._source.nodes):
            self._nodes[node.name] = self._add(node, f"n{index}")
        self._graph.output(tuple(self._argument(item) for item in self._source.outputs))
        return fx.GraphModule(root, self._graph)

    def _add(self, node: Node, name: str) -> fx.Node:
        arguments = tuple(self._argument(item) for item in node.arguments)
        keywords = {key: self._argument(item) for key, item in node.keyword_arguments.items()}
        if node.operator in REGIONS:
            target = run_with_autocast if node.operator == AUTOCAST_REGION else run_with_grad_mode
        elif node.operator == COND:
            target = run_cond
        elif node.operator == CUSTOM_FUNCTION:
            target = call_function
        elif has_schema(node.operator):
            target = checked(node.operator, self._tensor_bytes) or resolve(node.operator)
        else:
            target = bounded(node.operator)
        if node.operator == "aten.batch_norm.default":
            arguments, keywords = batch_norm.positional(arguments, keywords), {}
            target = target if arguments[5] is False else batch_norm.checked_batch_norm
        made = self._graph.create_node("call_function", target, arguments, keywords, name=name)
        made.meta["operator"] = node.operator
        return made

    def _argument(self, argument: Argument) -> Any:
        match argument:
            case NodeRef():
                return self._nodes[argument.name]
            case SubgraphRef():
                return self._graph.get_attr(self._subgraphs[argument.name])
            case FunctionRef():
                return self._graph.get_attr(self._functions[argument.name])
            case list():
                return [self._argument(item) for item in argument]
            case RankDevice():
                return self._device
            case DTypeRef():
                return getattr(torch, argument.name)
            case LayoutRef():
                return _LAYOUTS[argument.name]
            case MemoryFormatRef():
                return _MEMORY_FORMATS[argument.name]
        return argument
