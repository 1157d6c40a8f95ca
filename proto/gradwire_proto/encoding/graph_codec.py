"""Graphs of operators to messages and back. What a graph may do is for graph_check; this only reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwire_proto.encoding.enum_words import DTYPES, LAYOUTS, MEMORY_FORMATS
from gradwire_proto.encoding.scalar_codec import check_integer, check_text, duplicate, entry, missing, too_deep
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import program_pb2 as pb
from gradwire_proto.values import (
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

MAX_LIST_DEPTH = 8
"""Levels of lists in an argument. No operator's schema has more than two."""

MAX_GRAPH_DEPTH = 8
"""Levels of subgraphs and of the graphs of custom functions."""


def encode_argument(value: Argument, into: pb.Argument | None = None, field: str = "argument") -> pb.Argument:
    """The message of an operator's argument."""
    message = pb.Argument() if into is None else into
    _encode_argument(value, message, field, 0)
    return message


def _encode_argument(value: Any, message: pb.Argument, field: str, depth: int) -> None:
    if isinstance(value, NodeRef):
        message.node = value.name
    elif value is None:
        message.none = 0  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, bool):
        message.boolean = value
    elif isinstance(value, int):
        message.integer = check_integer(value, field)
    elif isinstance(value, float):
        message.number = value
    elif isinstance(value, str):
        message.text = check_text(value, field)
    elif isinstance(value, list):
        if depth == MAX_LIST_DEPTH:
            raise too_deep(field, MAX_LIST_DEPTH)
        message.list.SetInParent()
        for index, item in enumerate(value):
            _encode_argument(item, message.list.items.add(), f"{field}[{index}]", depth + 1)
    elif isinstance(value, DTypeRef):
        message.dtype = DTYPES.number(value.name, field)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, RankDevice):
        message.device.SetInParent()
    elif isinstance(value, MemoryFormatRef):
        message.memory_format = MEMORY_FORMATS.number(value.name, field)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, LayoutRef):
        message.layout = LAYOUTS.number(value.name, field)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, SubgraphRef):
        message.subgraph = value.name
    elif isinstance(value, FunctionRef):
        message.function = value.name
    elif isinstance(value, complex):
        message.complex.real, message.complex.imaginary = value.real, value.imag
    else:
        raise InvalidArgument(
            f"no operator takes a {type(value).__qualname__}", field=field, reason="ARGUMENT_TYPE_UNSUPPORTED"
        )


def decode_argument(message: pb.Argument, field: str = "argument") -> Argument:
    """The argument of a message, which must be set."""
    return _decode_argument(message, field, 0)


def _decode_argument(message: pb.Argument, field: str, depth: int) -> Any:
    kind = message.WhichOneof("kind")
    if kind == "node":
        return NodeRef(message.node)
    if kind in ("integer", "number", "boolean", "text"):
        return getattr(message, kind)
    if kind == "none":
        return None
    if kind == "list":
        if depth == MAX_LIST_DEPTH:
            raise too_deep(field, MAX_LIST_DEPTH)
        return [_decode_argument(item, f"{field}[{index}]", depth + 1) for index, item in enumerate(message.list.items)]
    if kind == "dtype":
        return DTypeRef(DTYPES.word(message.dtype, field))
    if kind == "device":
        return RankDevice()
    if kind == "memory_format":
        return MemoryFormatRef(MEMORY_FORMATS.word(message.memory_format, field))
    if kind == "layout":
        return LayoutRef(LAYOUTS.word(message.layout, field))
    if kind == "subgraph":
        return SubgraphRef(message.subgraph)
    if kind == "function":
        return FunctionRef(message.function)
    if kind == "complex":
        return complex(message.complex.real, message.complex.imaginary)
    raise missing(field, "an argument")


def encode_node(value: Node, into: pb.Node | None = None, field: str = "node") -> pb.Node:
    """The message of one operator call."""
    message = pb.Node() if into is None else into
    message.name = value.name
    message.operator = value.operator
    for index, argument in enumerate(value.arguments):
        _encode_argument(argument, message.arguments.add(), f"{field}.arguments[{index}]", 0)
    for name, argument in value.keyword_arguments.items():
        child = message.keyword_arguments.add(name=name)
        _encode_argument(argument, child.value, entry(f"{field}.keyword_arguments", name), 0)
    return message


def decode_node(message: pb.Node, field: str = "node") -> Node:
    """The operator call of a message."""
    keyword_arguments: dict[str, Argument] = {}
    for item in message.keyword_arguments:
        path = entry(f"{field}.keyword_arguments", item.name)
        if item.name in keyword_arguments:
            raise duplicate(path)
        keyword_arguments[item.name] = _decode_argument(item.value, path, 0)
    arguments = tuple(
        _decode_argument(item, f"{field}.arguments[{index}]", 0) for index, item in enumerate(message.arguments)
    )
    return Node(message.name, message.operator, arguments, keyword_arguments)


def encode_graph(value: Graph, into: pb.Graph | None = None, field: str = "graph") -> pb.Graph:
    """The message of a graph, with its subgraphs and functions."""
    message = pb.Graph() if into is None else into
    _encode_graph(value, message, field, 0)
    return message


def _encode_graph(value: Graph, message: pb.Graph, field: str, depth: int) -> None:
    if depth > MAX_GRAPH_DEPTH:
        raise too_deep(field, MAX_GRAPH_DEPTH)
    message.SetInParent()
    message.inputs.extend(value.inputs)
    for index, node in enumerate(value.nodes):
        encode_node(node, message.nodes.add(), f"{field}.nodes[{index}]")
    for index, output in enumerate(value.outputs):
        _encode_argument(output, message.outputs.add(), f"{field}.outputs[{index}]", 0)
    for name, subgraph in value.subgraphs.items():
        child = message.subgraphs.add(name=name)
        _encode_graph(subgraph, child.graph, entry(f"{field}.subgraphs", name), depth + 1)
    for name, function in value.functions.items():
        path, function_message = entry(f"{field}.functions", name), message.functions.add(name=name)
        _encode_graph(function.forward, function_message.forward, f"{path}.forward", depth + 1)
        _encode_graph(function.backward, function_message.backward, f"{path}.backward", depth + 1)
        function_message.results = function.results
        function_message.differentiable_results.extend(function.differentiable_results)
        function_message.differentiable_inputs.extend(function.differentiable_inputs)


def decode_graph(message: pb.Graph, field: str = "graph") -> Graph:
    """The graph of a message, with its subgraphs and functions."""
    return _decode_graph(message, field, 0)


def _decode_graph(message: pb.Graph, field: str, depth: int) -> Graph:
    if depth > MAX_GRAPH_DEPTH:
        raise too_deep(field, MAX_GRAPH_DEPTH)
    subgraphs: dict[str, Graph] = {}
    for item in message.subgraphs:
        path = entry(f"{field}.subgraphs", item.name)
        if item.name in subgraphs:
            raise duplicate(path)
        subgraphs[item.name] = _decode_graph(item.graph, path, depth + 1)
    functions: dict[str, CustomFunction] = {}
    for item in message.functions:
        path = entry(f"{field}.functions", item.name)
        if item.name in functions:
            raise duplicate(path)
        functions[item.name] = _decode_function(item, path, depth + 1)
    return Graph(
        inputs=tuple(message.inputs),
        nodes=tuple(decode_node(node, f"{field}.nodes[{index}]") for index, node in enumerate(message.nodes)),
        outputs=tuple(
            _decode_argument(output, f"{field}.outputs[{index}]", 0) for index, output in enumerate(message.outputs)
        ),
        subgraphs=subgraphs,
        functions=functions,
    )


def _decode_function(message: pb.CustomFunction, field: str, depth: int) -> CustomFunction:
    for name in ("forward", "backward"):
        if not message.HasField(name):  # pyright: ignore[reportArgumentType]
            raise missing(f"{field}.{name}", "a graph")
    return CustomFunction(
        forward=_decode_graph(message.forward, f"{field}.forward", depth),
        backward=_decode_graph(message.backward, f"{field}.backward", depth),
        results=message.results,
        differentiable_results=tuple(message.differentiable_results),
        differentiable_inputs=tuple(message.differentiable_inputs),
    )


def encode_operators(operators: Mapping[str, str], into: Any = None) -> Any:
    """A list of OperatorSchema; appended to the repeated field `into` where one is given."""
    messages = [] if into is None else into
    messages.extend(pb.OperatorSchema(operator=name, schema=schema) for name, schema in operators.items())
    return messages


def decode_operators(messages: Any, field: str = "operators") -> dict[str, str]:
    """Schemas by operator. An operator that stands twice is refused."""
    operators: dict[str, str] = {}
    for item in messages:
        if item.operator in operators:
            raise duplicate(entry(field, item.operator))
        operators[item.operator] = item.schema
    return operators
