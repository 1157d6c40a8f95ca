"""Which inputs a graph changes in place. Reads alias annotations of schemas; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gradwire_proto.operators import COND, CUSTOM_FUNCTION, REGIONS
from gradwire_proto.values import Argument, CustomFunction, FunctionRef, Graph, Node, NodeRef, SubgraphRef

# Operators whose schemas keep quiet about what they do.
_RETURNS_ITS_INPUT = frozenset(
    f"aten.{name}.default" for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)
_RUNNING_STATISTICS = {  # operator: (the running tensors, the flag under which they move)
    "aten.batch_norm.default": ((3, 4), 5),
    "aten.native_batch_norm.default": ((3, 4), 5),
    "aten.instance_norm.default": ((3, 4), 5),
}


def written_inputs(graph: Graph, operators: Mapping[str, str]) -> set[int]:
    """Indices of the inputs of `graph` that running it and its backward may change, through views of them as well.

    `operators` holds the schema of each operator by name.
    """
    written, _ = _follow(graph, [{index} for index in range(len(graph.inputs))], operators)
    return written


def written_backward(function: CustomFunction, operators: Mapping[str, str]) -> tuple[set[int], set[int]]:
    """What a function's backward may change: (indices of its gradients, indices of the function's inputs)."""
    _, outputs = _follow(function.forward, [{index} for index in range(len(function.forward.inputs))], operators)
    gradients = len(function.differentiable_results)
    written = written_inputs(function.backward, operators)
    read = outputs[function.results :]
    inputs = set().union(*(read[index - gradients] for index in written if index >= gradients))
    return {index for index in written if index < gradients}, inputs


Origins = set[int]
"""The graph inputs whose memory a value may share."""


def _follow(graph: Graph, origins: Sequence[Origins], operators: Mapping[str, str]) -> tuple[set[int], list[Origins]]:
    """(inputs written, what each output may share memory with)."""
    known: dict[str, Origins] = dict(zip(graph.inputs, origins, strict=True))
    written: set[int] = set()
    for node in graph.nodes:
        if node.operator in REGIONS:
            subgraph, arguments = _region(node, graph)
            inner, outputs = _follow(subgraph, [_origins_of(item, known) for item in arguments], operators)
            written |= inner
            known[node.name] = set().union(*outputs) if outputs else set()
            continue
        if node.operator == COND:
            known[node.name] = set()
            for subgraph, arguments in _branches(node, graph):
                # Either may run.
                inner, outputs = _follow(subgraph, [_origins_of(item, known) for item in arguments], operators)
                written |= inner
                known[node.name] |= set().union(*outputs)
            continue
        if node.operator == CUSTOM_FUNCTION:
            inner, known[node.name] = _call(node, graph, known, operators)
            written |= inner
            continue
        for argument in _written_arguments(node, operators):
            written |= _origins_of(argument, known)
        shared = set()
        for argument in _shared_arguments(node, operators):
            shared |= _origins_of(argument, known)
        known[node.name] = shared
    return written, [_origins_of(output, known) for output in graph.outputs]


def _call(
    node: Node, graph: Graph, known: Mapping[str, Origins], operators: Mapping[str, str]
) -> tuple[set[int], Origins]:
    """(inputs written by a function's forward or backward, what its results may share memory with)."""
    (name, *arguments), origins = node.arguments, []
    function = graph.functions[name.name] if isinstance(name, FunctionRef) else None
    if function is None:
        return set(), set()
    origins = [_origins_of(argument, known) for argument in arguments]
    written, outputs = _follow(function.forward, origins, operators)
    results, read = outputs[: function.results], outputs[function.results :]
    gradients: list[Origins] = [set() for _ in function.differentiable_results]
    later, _ = _follow(function.backward, [*gradients, *read], operators)
    return written | later, set().union(*results)


def _region(node: Node, graph: Graph) -> tuple[Graph, tuple[Argument, ...]]:
    for position, argument in enumerate(node.arguments):
        if isinstance(argument, SubgraphRef):
            return graph.subgraphs[argument.name], node.arguments[position + 1 :]
    return Graph((), (), ()), ()


def _branches(node: Node, graph: Graph) -> list[tuple[Graph, list[Argument]]]:
    operands = node.arguments[3]
    taken = operands if isinstance(operands, list) else []
    return [(graph.subgraphs[each.name], taken) for each in node.arguments if isinstance(each, SubgraphRef)]


def _origins_of(argument: Argument, known: Mapping[str, Origins]) -> Origins:
    if isinstance(argument, NodeRef):
        return known[argument.name]
    if isinstance(argument, list):
        return set().union(*(_origins_of(item, known) for item in argument)) if argument else set()
    return set()


def _written_arguments(node: Node, operators: Mapping[str, str]) -> list[Argument]:
    if node.operator in _RUNNING_STATISTICS:
        tensors, flag = _RUNNING_STATISTICS[node.operator]
        parameters = parse_schema(operators[node.operator])
        # Only a literal False leaves them alone for certain.
        moves = _argument(node, flag, parameters) is not False
        return [_argument(node, index, parameters) for index in tensors] if moves else []
    parameters = parse_schema(operators.get(node.operator, ""))
    return [_argument(node, index, parameters) for index, each in enumerate(parameters) if each.written]


def _shared_arguments(node: Node, operators: Mapping[str, str]) -> list[Argument]:
    if node.operator == "operator.getitem" or node.operator in _RETURNS_ITS_INPUT:
        return [*node.arguments[:1], *node.keyword_arguments.values()]
    parameters = parse_schema(operators.get(node.operator, ""))
    return [_argument(node, index, parameters) for index, each in enumerate(parameters) if each.aliased]


def _argument(node: Node, index: int, parameters: Sequence[Parameter]) -> Argument:
    if index < len(node.arguments):
        return node.arguments[index]
    return node.keyword_arguments.get(parameters[index].name) if index < len(parameters) else None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a schema: whether its memory is written, whether a result may share it, and whether it may be left
    out."""

    name: str
    written: bool
    aliased: bool
    has_default: bool


_PARAMETER = re.compile(r"(?P<type>\S+?(?:\([^)]*\))?\S*) (?P<name>\w+)(?P<default>=.*)?")


@lru_cache(maxsize=4096)
def parse_schema(schema: str) -> tuple[Parameter, ...]:
    """The parameters of a schema such as "aten::add_.Tensor(Tensor(a!) self, Tensor other) -> Tensor(a!)".

    A text that is no schema has no parameters.
    """
    start, end = schema.find("("), schema.rfind(") -> ")
    if start < 0 or end < 0:
        return ()
    found = []
    for text in _split(schema[start + 1 : end]):
        match = _PARAMETER.fullmatch(text.strip())
        if match:
            annotation = re.search(r"\(([^)]*)\)", match["type"])
            written = bool(annotation and "!" in annotation[1])
            found.append(Parameter(match["name"], written, annotation is not None, match["default"] is not None))
    return tuple(found)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts: list[str] = []
    depth, current, quoted = 0, "", False
    for character in text:
        quoted ^= character in "\"'"
        depth += 0 if quoted else (character in "([") - (character in ")]")
        if character == "," and depth == 0 and not quoted:
            parts.append(current)
            current = ""
        else:
            current += character
    return [*parts, current] if current.strip() else parts


def positional(node: Node, operators: Mapping[str, str]) -> list[Any]:
    """A node's arguments in the order of its schema, None for those left out after the last one given by name."""
    parameters = parse_schema(operators.get(node.operator, ""))
    names = [each.name for each in parameters]
    last = max([names.index(name) + 1 for name in node.keyword_arguments if name in names], default=0)
    count = max(len(node.arguments), last)
    return [_argument(node, index, parameters) for index in range(count)]
