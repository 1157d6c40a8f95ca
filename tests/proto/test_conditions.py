"""torch.cond in a message: two subgraphs that fit each other and what they take; either may write, and is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from gradwire_proto.conditions import run_cond
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.graph_writes import written_inputs
from gradwire_proto.node_check import GraphCheck
from gradwire_proto.operators import schema_of
from gradwire_proto.values import Graph, Limits, Node, NodeRef, RankDevice, SubgraphRef
from gradwire_workers.programs.graph_builder import build_graph
from gradwire_workers.programs.size_check import check_sizes

P, X, A = NodeRef("p"), NodeRef("x"), NodeRef("a")
PLAIN = Graph(inputs=("a",), nodes=(), outputs=(A,))
ADDS = Graph(inputs=("a",), nodes=(Node("w", "aten.add_.Tensor", (A, A)),), outputs=(A,))
HUGE = Graph(
    inputs=("a",),
    nodes=(Node("z", "aten.zeros.default", ([1 << 12, 1 << 12],), {"device": RankDevice()}),),
    outputs=(A,),
)
CALL = Node("c", "higher_order.cond", (P, SubgraphRef("t"), SubgraphRef("f"), [X]))
OPERATORS = {name: schema_of(name) for name in ("aten.add_.Tensor", "aten.zeros.default")}


def graph(call: Node = CALL, true: Graph = PLAIN, false: Graph = PLAIN) -> Graph:
    first = Node("y", "operator.getitem", (NodeRef("c"), 0))
    return Graph(inputs=("p", "x"), nodes=(call, first), outputs=(NodeRef("y"),), subgraphs={"t": true, "f": false})


def built(**parts) -> fx.GraphModule:
    return build_graph(graph(**parts), torch.device("cpu"))


@pytest.mark.parametrize(
    "parts",
    [
        {"call": replace(CALL, arguments=CALL.arguments[:3])},
        {"call": replace(CALL, arguments=(True, *CALL.arguments[1:]))},
        {"call": replace(CALL, arguments=(*CALL.arguments[:3], X))},
        {"call": replace(CALL, arguments=(*CALL.arguments[:3], [X, X]))},
        {"call": replace(CALL, arguments=(*CALL.arguments[:3], [NodeRef("later")]))},
        {"call": replace(CALL, arguments=(P, SubgraphRef("t"), SubgraphRef("t"), [X]))},
        {"call": replace(CALL, arguments=(P, SubgraphRef("t"), SubgraphRef("no"), [X]))},
        {"call": replace(CALL, arguments=(P, SubgraphRef("t"), X, [X]))},
        {"call": replace(CALL, keyword_arguments={"p": P})},
        {"false": replace(PLAIN, outputs=(A, A))},
        {"false": replace(PLAIN, inputs=("a", "b"))},
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(parts):
    GraphCheck(OPERATORS, Limits()).check(graph(), "graph")
    with pytest.raises(InvalidArgument) as caught:
        GraphCheck(OPERATORS, Limits()).check(graph(**parts), "graph")
    assert caught.value.reason == "GRAPH_MALFORMED"


def test_what_either_branch_writes_is_written():
    assert written_inputs(graph(), OPERATORS) == set()
    assert written_inputs(graph(true=ADDS), OPERATORS) == written_inputs(graph(false=ADDS), OPERATORS) == {1}


@pytest.mark.parametrize("side", ["true", "false"])
def test_both_branches_are_measured(side):
    inputs = [torch.ones((), dtype=torch.bool, device="meta"), torch.ones(3, device="meta")]
    check_sizes(built(), inputs, 1 << 20, "graph")
    with pytest.raises(ResourceExhausted, match="tensor_bytes"):
        check_sizes(built(**{side: HUGE}), inputs, 1 << 20, "graph")


@pytest.mark.parametrize("predicate", [True, 3, torch.ones(2, dtype=torch.bool), torch.ones(()), None])
def test_a_predicate_that_is_no_truth_value_is_refused(predicate):
    with pytest.raises(InvalidArgument) as caught:
        built()(predicate, torch.ones(3))
    assert caught.value.reason == "PROGRAM_FAILED"


@pytest.mark.parametrize("truth", [True, False])
def test_values_and_gradients_are_the_chosen_branchs_and_zero_for_what_it_does_not_read(truth):
    one, other = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    (found,) = run_cond(torch.tensor([truth]), lambda a, b: (a.sin(),), lambda a, b: (b * 2,), [one, other])
    assert torch.equal(found, one.sin() if truth else other * 2)
    gradients = torch.autograd.grad(found.sum(), (one, other))
    zero = torch.zeros_like(one)
    expected = (one.cos(), zero) if truth else (zero, zero + 2)
    assert all(map(torch.equal, gradients, expected))
