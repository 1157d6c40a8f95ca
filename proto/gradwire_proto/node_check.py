"""Are a graph's nodes well formed? Names, references, operators and how many arguments they take."""

from __future__ import annotations

import cmath
from collections import Counter
from collections.abc import Mapping

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.graph_writes import parse_schema
from gradwire_proto.operators import AUTOCAST_REGION, COND, CUSTOM_FUNCTION, REGIONS, allowed_operators, has_schema
from gradwire_proto.values import Argument, CustomFunction, FunctionRef, Graph, Limits, Node, NodeRef, SubgraphRef

MAX_SUBGRAPH_DEPTH = 8


class GraphCheck:
    """Checks graphs and counts their nodes, those of subgraphs and functions included.

    What a graph inside another takes and gives counts as well: it costs as much, and a function's may be any number.
    """

    def __init__(self, operators: Mapping[str, str], limits: Limits, count: int = 0) -> None:
        self._operators = operators
        self._limits = limits
        self._count = count

    def check(self, graph: Graph, field: str, depth: int = 0) -> int:
        """Check a graph; what was counted so far."""
        if depth > MAX_SUBGRAPH_DEPTH:
            raise malformed(field, f"subgraphs nested deeper than {MAX_SUBGRAPH_DEPTH}")
        self._count += len(graph.nodes) + (len(graph.inputs) + len(graph.outputs) if depth else 0)
        if self._count > self._limits.graph_nodes:
            raise ResourceExhausted(
                f"more than {self._limits.graph_nodes} nodes; the limit is `graph_nodes`",
                field=field,
                reason="GRAPH_TOO_LARGE",
            )
        known: set[str] = set()
        for index, name in enumerate(graph.inputs):
            if not name or name in known:
                raise malformed(f"{field}.inputs[{index}]", f"expected a name used once, got {short(name)}")
            known.add(name)
        for index, node in enumerate(graph.nodes):
            self._check_node(node, graph, known, f"{field}.nodes[{index}]")
            known.add(node.name)
        for index, output in enumerate(graph.outputs):
            _check_output(output, known, f"{field}.outputs[{index}]")
        calls = Counter(
            argument
            for node in graph.nodes
            for argument in node.arguments
            if isinstance(argument, (SubgraphRef, FunctionRef))
        )
        for name, subgraph in graph.subgraphs.items():
            path = f"{field}.subgraphs[{short(name)}]"
            _check_runs_once(calls[SubgraphRef(name)], path)
            self.check(subgraph, path, depth + 1)
        for name, function in graph.functions.items():
            path = f"{field}.functions[{short(name)}]"
            _check_runs_once(calls[FunctionRef(name)], path)
            _check_function(function, path)
            self.check(function.forward, f"{path}.forward", depth + 1)
            self.check(function.backward, f"{path}.backward", depth + 1)
        return self._count

    def _check_node(self, node: Node, graph: Graph, known: set[str], field: str) -> None:
        if node.operator not in allowed_operators():
            raise InvalidArgument(
                f"operator {short(node.operator)} is not in the allowlist",
                field=f"{field}.operator",
                reason="OPERATOR_NOT_ALLOWED",
            )
        if not node.name or node.name in known:
            raise malformed(f"{field}.name", f"expected a name used once, got {short(node.name)}")
        if node.operator in REGIONS:
            _check_region(node, graph, known, field)
            return
        if node.operator == COND:
            _check_cond(node, graph, known, field)
            return
        if node.operator == CUSTOM_FUNCTION:
            _check_call(node, graph, known, field)
            return
        for index, argument in enumerate(node.arguments):
            _check_argument(argument, known, f"{field}.arguments[{index}]")
        for name, argument in node.keyword_arguments.items():
            _check_argument(argument, known, f"{field}.keyword_arguments[{short(name)}]")
        if has_schema(node.operator):
            self._check_arity(node, field)
        elif node.keyword_arguments or not 1 <= len(node.arguments) <= 3:
            raise malformed(field, f"{node.operator} takes 1 to 3 arguments, by position")

    def _check_arity(self, node: Node, field: str) -> None:
        schema = self._operators.get(node.operator)
        if schema is None:
            raise malformed(f"{field}.operator", f"the program brings no schema of {node.operator}")
        parameters = parse_schema(schema)
        names = [parameter.name for parameter in parameters]
        if len(node.arguments) > len(names):
            raise malformed(
                f"{field}.arguments", f"{node.operator} takes {len(names)} arguments, got {len(node.arguments)}"
            )
        for name in node.keyword_arguments:
            if name not in names[len(node.arguments) :]:
                raise malformed(f"{field}.keyword_arguments", f"{node.operator} takes no {short(name)} there")
        for parameter in parameters[len(node.arguments) :]:
            if not parameter.has_default and parameter.name not in node.keyword_arguments:
                raise malformed(f"{field}.arguments", f"{node.operator} needs its argument {short(parameter.name)}")


def _check_region(node: Node, graph: Graph, known: set[str], field: str) -> None:
    """A region takes its settings, one subgraph, and that subgraph's inputs, all by position."""
    settings = 4 if node.operator == AUTOCAST_REGION else 1
    if node.keyword_arguments or len(node.arguments) <= settings:
        raise malformed(field, f"{node.operator} takes {settings} settings, a subgraph and its inputs")
    subgraph = node.arguments[settings]
    if not isinstance(subgraph, SubgraphRef) or subgraph.name not in graph.subgraphs:
        raise malformed(f"{field}.arguments[{settings}]", "expected a subgraph of this graph")
    inputs = node.arguments[settings + 1 :]
    expected = len(graph.subgraphs[subgraph.name].inputs)
    if len(inputs) != expected:
        raise malformed(f"{field}.arguments", f"the subgraph takes {expected} inputs, got {len(inputs)}")
    for index, argument in enumerate((*node.arguments[:settings], *inputs)):
        _check_argument(argument, known, f"{field}.arguments[{index}]")


def _check_cond(node: Node, graph: Graph, known: set[str], field: str) -> None:
    """A choice takes a predicate, two subgraphs that fit each other, and the list of what both take, by position."""
    if node.keyword_arguments or len(node.arguments) != 4:
        raise malformed(field, f"{node.operator} takes a predicate, two subgraphs and a list, by position")
    predicate, *branches, operands = node.arguments
    if not isinstance(predicate, NodeRef) or not isinstance(operands, list):
        raise malformed(field, f"{node.operator} takes a tensor as predicate, and a list of what its subgraphs take")
    _check_argument(predicate, known, f"{field}.arguments[0]")
    _check_argument(operands, known, f"{field}.arguments[3]")
    outputs = set()
    for index, branch in enumerate(branches, 1):
        if not isinstance(branch, SubgraphRef) or branch.name not in graph.subgraphs:
            raise malformed(f"{field}.arguments[{index}]", "expected a subgraph of this graph")
        subgraph = graph.subgraphs[branch.name]
        if len(subgraph.inputs) != len(operands):
            raise malformed(
                f"{field}.arguments[3]", f"the subgraph takes {len(subgraph.inputs)} inputs, got {len(operands)}"
            )
        outputs.add(len(subgraph.outputs))
    if len(outputs) > 1:
        raise malformed(f"{field}.arguments[2]", "expected a subgraph with as many outputs as the other")


def _check_call(node: Node, graph: Graph, known: set[str], field: str) -> None:
    """A call of a custom function takes the function and its inputs, all by position."""
    function = node.arguments[0] if node.arguments else None
    if not isinstance(function, FunctionRef) or function.name not in graph.functions:
        raise malformed(f"{field}.arguments[0]", "expected a function of this graph")
    inputs = node.arguments[1:]
    expected = len(graph.functions[function.name].forward.inputs)
    if node.keyword_arguments or len(inputs) != expected:
        raise malformed(f"{field}.arguments", f"the function takes {expected} inputs by position, got {len(inputs)}")
    for index, argument in enumerate(inputs):
        _check_argument(argument, known, f"{field}.arguments[{index + 1}]")


def _check_function(function: CustomFunction, field: str) -> None:
    """The backward takes what the forward gives, and gives what the function says that it does."""
    outputs = len(function.forward.outputs)
    if not 1 <= function.results <= outputs:
        raise malformed(f"{field}.results", f"expected 1 to {outputs}, the outputs of forward, got {function.results}")
    for index, output in enumerate(function.forward.outputs[: function.results]):
        if not isinstance(output, NodeRef):
            raise malformed(f"{field}.forward.outputs[{index}]", "a result is a tensor, which some node gives")
    for index, output in enumerate(function.backward.outputs):
        if output is not None and not isinstance(output, NodeRef):
            raise malformed(f"{field}.backward.outputs[{index}]", "expected a tensor, which some node gives, or None")
    _check_indices(function.differentiable_results, function.results, f"{field}.differentiable_results")
    _check_indices(function.differentiable_inputs, len(function.forward.inputs), f"{field}.differentiable_inputs")
    expected = len(function.differentiable_results) + outputs - function.results
    if len(function.backward.inputs) != expected:
        raise malformed(f"{field}.backward.inputs", f"expected {expected}, got {len(function.backward.inputs)}")
    if len(function.backward.outputs) != len(function.differentiable_inputs):
        raise malformed(
            f"{field}.backward.outputs",
            f"expected {len(function.differentiable_inputs)}, got {len(function.backward.outputs)}",
        )


def _check_indices(indices: tuple[int, ...], count: int, field: str) -> None:
    if list(indices) != sorted(set(indices)) or any(not 0 <= index < count for index in indices):
        raise malformed(field, f"expected rising indices from 0 to {count - 1}, got {list(indices)[:16]}")


def _check_runs_once(calls: int, field: str) -> None:
    # Else a few nodes could stand for as many as they like: subgraphs hold subgraphs.
    if calls != 1:
        raise malformed(field, f"expected one node that runs it, got {calls}")


def _check_output(output: Argument, known: set[str], field: str) -> None:
    """A graph gives back results and plain constants: what a batch's answer can hold."""
    if output is not None and not isinstance(output, (NodeRef, bool, int, float, str)):
        raise malformed(field, f"expected a node, None, a number or text, got a {type(output).__name__}")
    _check_argument(output, known, field)


def _check_argument(argument: Argument, known: set[str], field: str) -> None:
    if isinstance(argument, NodeRef):
        if argument.name not in known:
            raise malformed(field, f"{short(argument.name)} is no input or earlier node")
    elif isinstance(argument, SubgraphRef):
        raise malformed(field, "a subgraph cannot stand here")
    elif isinstance(argument, FunctionRef):
        raise malformed(field, "a function cannot stand here")
    elif isinstance(argument, complex):
        if not cmath.isfinite(argument):
            raise malformed(field, f"expected a finite complex number, got {argument}")
    elif isinstance(argument, list):
        for item in argument:
            _check_argument(item, known, field)


def short(name: object) -> str:
    """A client's name, quoted and cut, for messages."""
    return repr(name if not isinstance(name, str) else name[:80])


def malformed(field: str, message: str) -> InvalidArgument:
    """The error of a graph that makes no sense."""
    return InvalidArgument(message, field=field, reason="GRAPH_MALFORMED")
