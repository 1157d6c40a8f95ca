"""Functions with their own backward are checked like subgraphs, and the two graphs must fit each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwire_proto.encoding.graph_codec import MAX_GRAPH_DEPTH, decode_graph, encode_graph
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.node_check import GraphCheck
from gradwire_proto.values import CustomFunction, FunctionRef, Graph, Limits, Node, NodeRef, RankDevice

MUL = "aten::mul.Tensor(Tensor self, Tensor other) -> Tensor"
X, W, G = NodeRef("x"), NodeRef("w"), NodeRef("g")
FUNCTION = CustomFunction(
    forward=Graph(inputs=("x", "w"), nodes=(Node("m", "aten.mul.Tensor", (X, W)),), outputs=(NodeRef("m"), W)),
    backward=Graph(inputs=("g", "w"), nodes=(Node("m", "aten.mul.Tensor", (G, W)),), outputs=(NodeRef("m"), None)),
    results=1,
    differentiable_results=(0,),
    differentiable_inputs=(0, 1),
)
CALL = Node("r", "higher_order.custom_function", (FunctionRef("f"), X, X))


def graph(*, function: CustomFunction = FUNCTION, calls: tuple[Node, ...] = (CALL,)) -> Graph:
    return Graph(inputs=("x",), nodes=calls, outputs=(X,), functions={"f": function})


def check(checked: Graph, limits: Limits | None = None) -> int:
    return GraphCheck({"aten.mul.Tensor": MUL}, limits or Limits()).check(checked, "graph")


def with_graphs(**changes: Graph | tuple) -> CustomFunction:
    """FUNCTION with other `outputs` or `inputs` of `forward` or `backward`, written forward_outputs=..."""
    made = FUNCTION
    for name, value in changes.items():
        side, attribute = name.split("_")
        made = replace(made, **{side: replace(getattr(made, side), **{attribute: value})})
    return made


def nested(depth: int) -> Graph:
    found = Graph(inputs=("x", "w"), nodes=(), outputs=(X, W))
    for _ in range(depth):
        function = replace(FUNCTION, forward=found)
        found = Graph(
            inputs=("x", "w"),
            nodes=(replace(CALL, arguments=(FunctionRef("f"), X, W)),),
            outputs=(X, W),
            functions={"f": function},
        )
    return found


def test_a_sound_function_passes_and_its_nodes_inputs_and_outputs_count():
    assert check(graph()) == 3 + 4 + 4
    with pytest.raises(ResourceExhausted, match="graph_nodes"):
        check(graph(), Limits(graph_nodes=10))


@pytest.mark.parametrize(
    ("checked", "field"),
    [
        (graph(calls=()), "functions['f']"),
        (graph(calls=(CALL, replace(CALL, name="again"))), "functions['f']"),
        (graph(calls=(CALL, Node("n", "aten.mul.Tensor", (X, FunctionRef("f"))))), "nodes[1].arguments[1]"),
        (graph(calls=(replace(CALL, arguments=()),)), "nodes[0].arguments[0]"),
        (graph(calls=(replace(CALL, arguments=(X, X, X)),)), "nodes[0].arguments[0]"),
        (graph(calls=(replace(CALL, arguments=(FunctionRef("h"), X, X)),)), "nodes[0].arguments[0]"),
        (graph(calls=(replace(CALL, arguments=(FunctionRef("f"), X)),)), "nodes[0].arguments"),
        (graph(calls=(replace(CALL, arguments=(FunctionRef("f"), X, W)),)), "nodes[0].arguments[2]"),
        (graph(calls=(replace(CALL, arguments=(FunctionRef("f"), X, FunctionRef("f"))),)), "nodes[0].arguments[2]"),
        (graph(calls=(replace(CALL, keyword_arguments={"k": 1}),)), "nodes[0].arguments"),
        *(
            (graph(function=function), f"functions['f'].{field}")
            for function, field in [
                (replace(FUNCTION, results=0), "results"),
                (replace(FUNCTION, results=3), "results"),
                (replace(FUNCTION, results=2**62), "results"),
                (replace(FUNCTION, differentiable_results=(1,)), "differentiable_results"),
                (replace(FUNCTION, differentiable_results=(-1,)), "differentiable_results"),
                (replace(FUNCTION, differentiable_results=(0, 0)), "differentiable_results"),
                (replace(FUNCTION, differentiable_results=()), "backward.inputs"),
                (replace(FUNCTION, differentiable_inputs=(1, 0)), "differentiable_inputs"),
                (replace(FUNCTION, differentiable_inputs=(0, 2)), "differentiable_inputs"),
                (replace(FUNCTION, differentiable_inputs=(0,)), "backward.outputs"),
                (with_graphs(forward_outputs=(3, W)), "forward.outputs[0]"),
                (with_graphs(forward_outputs=(NodeRef("later"), W)), "forward.outputs[0]"),
                (with_graphs(forward_outputs=(X, RankDevice())), "forward.outputs[1]"),
                (with_graphs(backward_outputs=(G, 1.0)), "backward.outputs[1]"),
                (with_graphs(backward_outputs=(G, X)), "backward.outputs[1]"),
                (with_graphs(backward_inputs=("g", "w", "x")), "backward.inputs"),
            ]
        ),
    ],
)
def test_a_function_whose_graphs_do_not_fit_is_refused_with_the_field(checked, field):
    with pytest.raises(InvalidArgument) as caught:
        check(checked)
    assert caught.value.reason == "GRAPH_MALFORMED"
    assert caught.value.field == f"graph.{field}"


@pytest.mark.parametrize("side", ["forward", "backward"])
def test_operators_of_both_graphs_must_be_allowed(side):
    bad = replace(getattr(FUNCTION, side), nodes=(Node("m", "aten.from_file.default", ("/etc/passwd",)),))
    with pytest.raises(InvalidArgument, match="from_file") as caught:
        check(graph(function=replace(FUNCTION, **{side: bad})))
    assert caught.value.reason == "OPERATOR_NOT_ALLOWED"


def test_functions_in_functions_end_at_a_depth():
    assert check(nested(MAX_GRAPH_DEPTH)) > 0
    with pytest.raises(InvalidArgument, match="deeper"):
        check(nested(MAX_GRAPH_DEPTH + 1))
    with pytest.raises(InvalidArgument) as caught:
        encode_graph(nested(MAX_GRAPH_DEPTH + 1))
    assert caught.value.reason == "NESTING_TOO_DEEP"


def test_a_message_that_is_nested_deeper_is_refused():
    message = encode_graph(nested(MAX_GRAPH_DEPTH))
    outer = encode_graph(nested(1))
    outer.functions[0].forward.CopyFrom(message)
    with pytest.raises(InvalidArgument) as caught:
        decode_graph(outer)
    assert caught.value.reason == "NESTING_TOO_DEEP"


@pytest.mark.parametrize("side", ["forward", "backward"])
def test_a_function_without_one_of_its_graphs_is_refused_with_the_field(side):
    message = encode_graph(graph())
    message.functions[0].ClearField(side)
    with pytest.raises(InvalidArgument) as caught:
        decode_graph(message)
    assert caught.value.reason == "FIELD_MISSING" and caught.value.field == f'graph.functions["f"].{side}'


def test_a_function_that_stands_twice_is_refused():
    message = encode_graph(graph())
    message.functions.append(message.functions[0])
    with pytest.raises(InvalidArgument) as caught:
        decode_graph(message)
    assert caught.value.reason == "DUPLICATE_NAME"
