"""No result of a graph is made that is larger than the limit, wherever in the graph it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradwire.export import ModuleExporter
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.operators import schema_of
from gradwire_proto.values import (
    Graph,
    GraphInput,
    LeafRef,
    Limits,
    Node,
    NodeRef,
    Program,
    RankDevice,
    SubgraphRef,
    Symbol,
    TensorSpec,
    Variant,
)
from gradwire_workers.lifted_limits import limits_lifted
from gradwire_workers.programs import build_program

LIMITS = Limits(tensor_bytes=1 << 20)
X = NodeRef("x")
HUGE = [1 << 10, 1 << 11]


def node(name: str, operator: str, *arguments, **keywords) -> Node:
    return Node(name, operator, arguments, keywords)


def program(*nodes: Node, shape=("rows", 4), symbols=("rows",), dtype="float32", **changes) -> Program:
    graph = Graph(inputs=("x",), nodes=nodes, outputs=(X,), **changes.pop("graph", {}))
    variant = Variant(
        name="v",
        training=True,
        graph=graph,
        graph_inputs=(GraphInput("input", 0),),
        input_structure=LeafRef(0),
        input_leaves=(TensorSpec(dtype, shape),),
        output_structure=LeafRef(0),
        symbols=tuple(Symbol(name) for name in symbols),
        **changes,
    )
    inner = [each for graph in graph.subgraphs.values() for each in graph.nodes]
    of_loss = [node for each in (variant.loss_graph, variant.weight_graph) if each for node in each.nodes]
    named = {each.operator for each in (*nodes, *inner, *of_loss) if each.operator.startswith("aten.")}
    return Program(
        torch_version=torch.__version__, tensors=(), variants=(variant,), operators={n: schema_of(n) for n in named}
    )


def refused(built: Program) -> None:
    with pytest.raises(ResourceExhausted) as caught:
        build_program(built, {}, limits=LIMITS)
    assert caught.value.reason == "TENSOR_TOO_LARGE"


ZEROS = node("z", "aten.zeros.default", HUGE, device=RankDevice())
DEPENDS = node("d", "aten.nonzero.default", X)
ITEM = (node("s", "aten.sum.default", X), node("i", "aten.item.default", NodeRef("s")))


@pytest.mark.parametrize(
    "nodes",
    [
        (DEPENDS, ZEROS),
        (*ITEM, ZEROS),
        (*ITEM, node("f", "aten.full.default", HUGE, NodeRef("i"), device=RankDevice())),
        (DEPENDS, node("e", "aten.repeat.default", NodeRef("d"), HUGE)),
        (*ITEM, node("a", "aten.arange.default", 1 << 21, device=RankDevice())),
        (DEPENDS, node("o", "aten.expand.default", X, [1 << 20, -1, 4])),
    ],
)
def test_sizes_that_a_graph_names_are_checked_behind_what_depends_on_data(nodes):
    refused(program(*nodes))


def test_sizes_inside_a_region_are_checked():
    inner = Graph(inputs=("a",), nodes=(ZEROS,), outputs=(NodeRef("a"),))
    region = node("r", "higher_order.wrap_with_set_grad_enabled", False, SubgraphRef("inner"), X)
    refused(program(region, graph={"subgraphs": {"inner": inner}}))


def test_sizes_of_a_loss_graph_are_checked_with_the_batch():
    def outer(outputs, targets):
        return (outputs[:, None] - targets[None]).square().mean()

    exported = ModuleExporter(nn.Linear(4, 2), outer).export_model(torch.randn(3, 4), torch.randn(3, 2))
    state = {name: tensor.clone() for name, tensor in exported.tensors.items()}
    built = build_program(exported.program, state, limits=LIMITS)
    for rows in (10, 300, 20):
        x, y = torch.randn(rows, 4), torch.randn(rows, 2)
        assert built.loss("train", built("train", x), [y]).item() > 0
    with pytest.raises(ResourceExhausted):
        built("train", torch.randn(600, 4))
    with pytest.raises(ResourceExhausted):  # gathered outputs have more rows than the rank's own
        built.loss("train", [torch.randn(600, 2)], [torch.randn(600, 2)])


def test_a_batch_that_came_while_limits_were_lifted_is_checked_when_it_comes_again():
    built = build_program(program(node("e", "aten.repeat.default", X, [1000, 1])), {}, limits=LIMITS)
    with limits_lifted():
        built("v", torch.ones(1000, 4))
    with pytest.raises(ResourceExhausted):
        built("v", torch.ones(1000, 4))


def test_a_loss_graph_is_checked_before_any_batch():
    loss = Graph(("x",), (ZEROS, node("s", "aten.sum.default", X)), (NodeRef("s"),))
    refused(program(loss_graph=loss, loss_graph_inputs=(GraphInput("output", 0),)))


def test_every_symbol_is_checked_with_the_batch():
    outer = node("m", "aten.matmul.default", NodeRef("t"), X)
    graph = program(node("t", "aten.t.default", X), outer, shape=("rows", "width"), symbols=("rows", "width"))
    built = build_program(graph, {}, limits=LIMITS)
    for rows, width in ((4, 8), (2, 500), (1000, 8)):
        built("v", torch.randn(rows, width))
    with pytest.raises(ResourceExhausted):
        built("v", torch.randn(4, 600))
    built("v", torch.randn(4, 501))


def test_small_graphs_that_depend_on_data_still_run():
    graph = program(*ITEM, DEPENDS, node("f", "aten.full.default", [3], NodeRef("i"), device=RankDevice()))
    built = build_program(graph, {}, limits=LIMITS)
    x = torch.randn(5, 4)
    assert torch.equal(built("v", x)[0], x)


@pytest.mark.parametrize("rows", [3, 3000])
def test_sizes_are_known_behind_an_operator_whose_types_autocast_makes_one(rows: int) -> None:
    class Mixed(nn.Module):
        """The second layer takes bfloat16, and has float32 weights: without autocast, that is refused."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.last(self.first(x).to(torch.bfloat16))
            return (h[:, :, None] * h[:, None, :]).sum((1, 2))

    exported = ModuleExporter(Mixed(), None, "bf16").export_model(torch.randn(3, 4))
    state = {name: tensor.clone() for name, tensor in exported.tensors.items()}
    program = build_program(exported.program, state, limits=Limits(tensor_bytes=100_000), casts=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        if rows == 3:
            program("train", torch.randn(rows, 4))
            return
        with pytest.raises(ResourceExhausted, match="tensor_bytes"):
            program("train", torch.randn(rows, 4))


def weighing(*nodes: Node) -> Program:
    weight = Graph(inputs=("x",), nodes=nodes, outputs=(NodeRef(nodes[-1].name),))
    return program(weight_graph=weight, weight_graph_inputs=(GraphInput("input", 0),))


def test_sizes_of_a_weight_graph_are_checked_with_the_batch():
    repeated = node("e", "aten.repeat.default", X, [1000, 1])
    built = build_program(weighing(repeated, node("s", "aten.sum.default", NodeRef("e"))), {}, limits=LIMITS)
    assert float(built.weight("v", (torch.ones(2, 4),), ())) == 8000
    with pytest.raises(ResourceExhausted):
        built.weight("v", (torch.ones(100_000, 4),), ())


def test_a_weight_graph_that_changes_the_batch_or_gives_no_number_is_refused():
    with pytest.raises(InvalidArgument) as caught:
        build_program(weighing(node("s", "aten.relu_.default", X)), {}, limits=LIMITS)
    assert (caught.value.reason, caught.value.field) == ("GRAPH_MALFORMED", "variant.weight_graph")
    built = build_program(weighing(node("s", "aten.relu.default", X)), {}, limits=LIMITS)
    with pytest.raises(InvalidArgument) as caught:
        built.weight("v", (torch.ones(2, 4),), ())
    assert caught.value.reason == "WEIGHT_NOT_SCALAR"
