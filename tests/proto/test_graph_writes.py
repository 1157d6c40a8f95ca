"""Which inputs a graph changes is read off schemas: directly, through views, through regions, by batch norm."""

from __future__ import annotations

import pytest

from gradwire_proto.graph_writes import parse_schema, written_backward, written_inputs
from gradwire_proto.operators import schema_of
from gradwire_proto.values import CustomFunction, FunctionRef, Graph, Node, NodeRef, SubgraphRef

A, B = NodeRef("a"), NodeRef("b")


def written(*nodes: Node, outputs=(), subgraphs=None, functions=None) -> set[int]:
    graph = Graph(("a", "b"), nodes, outputs, subgraphs or {}, functions or {})
    graphs = [each for f in graph.functions.values() for each in (f.forward, f.backward)]
    inner = [n for g in (*graph.subgraphs.values(), *graphs) for n in g.nodes]
    return written_inputs(graph, {n.operator: schema_of(n.operator) for n in (*nodes, *inner) if "aten" in n.operator})


def node(name: str, operator: str, *arguments, **keywords) -> Node:
    return Node(name, operator, arguments, keywords)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("n", "aten.add.Tensor", A, B)], set()),
        ([node("n", "aten.add_.Tensor", A, B)], {0}),
        ([node("n", "aten.div.out", A, A, out=B)], {1}),
        ([node("v", "aten.view.default", A, [3]), node("n", "aten.mul_.Tensor", NodeRef("v"), 2)], {0}),
        ([node("v", "aten.mul.Tensor", A, 2), node("n", "aten.mul_.Tensor", NodeRef("v"), 2)], set()),
        ([node("v", "aten.add_.Tensor", A, 1), node("n", "aten.add_.Tensor", NodeRef("v"), B)], {0}),
        (
            [
                node("s", "aten.split.Tensor", B, 2),
                node("g", "operator.getitem", NodeRef("s"), 0),
                node("n", "aten.zero_.default", NodeRef("g")),
            ],
            {1},
        ),
        ([node("d", "aten.dropout.default", A, 0.5, False), node("n", "aten.relu_.default", NodeRef("d"))], {0}),
        ([node("n", "aten.batch_norm.default", A, None, None, B, None, True, 0.1, 1e-5, False)], {1}),
        ([node("n", "aten.batch_norm.default", A, None, None, B, None, False, 0.1, 1e-5, False)], set()),
        ([node("n", "aten.embedding_renorm_.default", A, B, 1.0, 2.0)], {0}),
    ],
)
def test_written_inputs(nodes, expected):
    assert written(*nodes) == expected


def test_writes_inside_regions_and_through_what_they_return_count():
    inner = Graph(inputs=("x", "y"), nodes=(node("n", "aten.add_.Tensor", NodeRef("x"), 1),), outputs=(NodeRef("y"),))
    call = node("r", "higher_order.wrap_with_set_grad_enabled", False, SubgraphRef("inner"), B, A)
    assert written(call, subgraphs={"inner": inner}) == {1}
    item = node("g", "operator.getitem", NodeRef("r"), 0)
    after = node("z", "aten.zero_.default", NodeRef("g"))
    assert written(call, item, after, subgraphs={"inner": inner}) == {0, 1}


def function(*, forward: list[Node], backward: list[Node]) -> CustomFunction:
    """Of two inputs, with `x` as its result, and `y` as what its backward reads."""
    return CustomFunction(
        forward=Graph(inputs=("x", "y"), nodes=tuple(forward), outputs=(NodeRef("x"), NodeRef("y"))),
        backward=Graph(inputs=("g", "y"), nodes=tuple(backward), outputs=(NodeRef("g"),)),
        results=1,
        differentiable_results=(0,),
        differentiable_inputs=(0,),
    )


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ([], [], set()),
        ([node("n", "aten.add_.Tensor", NodeRef("x"), 1)], [], {1}),
        ([node("n", "aten.add_.Tensor", NodeRef("y"), 1)], [], {0}),
        ([], [node("n", "aten.add_.Tensor", NodeRef("y"), 1)], {0}),
        ([], [node("n", "aten.add_.Tensor", NodeRef("g"), 1)], set()),
    ],
)
def test_writes_inside_a_functions_forward_and_backward_count(forward, backward, expected):
    call = node("r", "higher_order.custom_function", FunctionRef("f"), B, A)
    assert written(call, functions={"f": function(forward=forward, backward=backward)}) == expected


def test_writes_through_a_functions_result_that_is_its_input_count():
    call = node("r", "higher_order.custom_function", FunctionRef("f"), B, A)
    item = node("g", "operator.getitem", NodeRef("r"), 0)
    after = node("z", "aten.zero_.default", NodeRef("g"))
    assert written(call, item, after, functions={"f": function(forward=[], backward=[])}) == {1}


@pytest.mark.parametrize(("name", "expected"), [("g", ({0}, set())), ("y", (set(), {1}))])
def test_what_a_backward_writes_is_told_apart(name, expected):
    found = function(forward=[], backward=[node("n", "aten.add_.Tensor", NodeRef(name), 1)])
    assert written_backward(found, {"aten.add_.Tensor": schema_of("aten.add_.Tensor")}) == expected


def test_a_schema_reads_with_all_its_kinds_of_parameters():
    schema = (
        'aten::f(Tensor(a!) self, Tensor(b -> *)[] xs, SymInt[2] size=[1, 1], str? mode="a, b", *, int n=0) -> (Tensor)'
    )
    found = [(each.name, each.written, each.aliased, each.has_default) for each in parse_schema(schema)]
    assert found == [
        ("self", True, True, False),
        ("xs", False, True, False),
        ("size", False, False, True),
        ("mode", False, False, True),
        ("n", False, False, True),
    ]
    assert parse_schema("rm -rf") == ()
