"""A malformed program is refused before anything is built, with the path of the field at fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.graph_check import check_program
from gradwire_proto.values import (
    ConstantSpec,
    DTypeRef,
    Graph,
    GraphInput,
    LayoutRef,
    LeafRef,
    Limits,
    MemoryFormatRef,
    Node,
    NodeRef,
    Program,
    RankDevice,
    StateTensor,
    SubgraphRef,
    Symbol,
    TensorSpec,
    Variant,
)

ADD = "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor"
WEIGHT = StateTensor(name="w", role="parameter", dtype="float32", shape=(3,), requires_grad=True)
NODE = Node("sum", "aten.add.Tensor", (NodeRef("x"), NodeRef("p")), {"alpha": 2})
GRAPH = Graph(inputs=("p", "x"), nodes=(NODE,), outputs=(NodeRef("sum"),))
VARIANT = Variant(
    name="train",
    training=True,
    graph=GRAPH,
    graph_inputs=(GraphInput("tensor", "w"), GraphInput("input", 0)),
    input_structure=LeafRef(0),
    input_leaves=(TensorSpec("float32", ("rows", 3)),),
    output_structure=LeafRef(0),
    symbols=(Symbol("rows", min=1),),
)
PROGRAM = Program(torch_version="2.13.0", tensors=(WEIGHT,), variants=(VARIANT,), operators={"aten.add.Tensor": ADD})


def with_variant(**changes) -> Program:
    return replace(PROGRAM, variants=(replace(VARIANT, **changes),))


def with_graph(**changes) -> Program:
    return with_variant(graph=replace(GRAPH, **changes))


def with_node(**changes) -> Program:
    return with_graph(nodes=(replace(NODE, **changes),))


def with_tensors(*tensors: StateTensor) -> Program:
    return replace(PROGRAM, tensors=(WEIGHT, *tensors))


def region(*arguments, calls: int = 1) -> Program:
    inner = Graph(inputs=("a",), nodes=(), outputs=(NodeRef("a"),))
    names = ["sum", *(f"sum{index}" for index in range(1, calls))][:calls]
    nodes = tuple(Node(name, "higher_order.wrap_with_set_grad_enabled", arguments) for name in names)
    return with_graph(nodes=nodes, subgraphs={"inner": inner}, outputs=(NodeRef(names[0] if names else "x"),))


UNFIT_OUTPUTS = (DTypeRef("float32"), RankDevice(), MemoryFormatRef("preserve"), LayoutRef("strided"), [1], 1j)


def test_a_sound_program_passes():
    check_program(PROGRAM)
    check_program(region(False, SubgraphRef("inner"), NodeRef("x")))
    check_program(
        with_variant(loss_graph=GRAPH, loss_graph_inputs=(GraphInput("output", 0), GraphInput("tensor", "w")))
    )
    check_program(
        with_variant(weight_graph=GRAPH, weight_graph_inputs=(GraphInput("input", 0), GraphInput("tensor", "w")))
    )


V, G = "program.variants[0]", "program.variants[0].graph"


@pytest.mark.parametrize(
    ("program", "field"),
    [
        (replace(PROGRAM, variants=()), "program.variants"),
        (replace(PROGRAM, variants=(VARIANT, VARIANT)), "program.variants"),
        (with_variant(graph=None), G),
        (with_graph(inputs=("p", "p")), f"{G}.inputs[1]"),
        (with_graph(inputs=("p",)), f"{V}.graph_inputs"),
        (with_node(name="x"), f"{G}.nodes[0].name"),
        (with_node(name=""), f"{G}.nodes[0].name"),
        (with_node(arguments=(NodeRef("x"), NodeRef("sum"))), f"{G}.nodes[0].arguments[1]"),
        (with_node(arguments=(NodeRef("x"), [[NodeRef("later")]])), f"{G}.nodes[0].arguments[1]"),
        (with_node(arguments=(NodeRef("x"), SubgraphRef("inner"))), f"{G}.nodes[0].arguments[1]"),
        (with_node(arguments=(NodeRef("x"),) * 4), f"{G}.nodes[0].arguments"),
        (with_node(keyword_arguments={"beta": 1}), f"{G}.nodes[0].keyword_arguments"),
        (with_node(keyword_arguments={"self": 1}), f"{G}.nodes[0].keyword_arguments"),
        (with_node(operator="operator.add"), f"{G}.nodes[0]"),
        (with_node(arguments=(NodeRef("x"),)), f"{G}.nodes[0].arguments"),
        (with_node(arguments=(NodeRef("x"), complex("inf"))), f"{G}.nodes[0].arguments[1]"),
        (
            with_node(keyword_arguments={"alpha": [complex(0, float("nan"))]}),
            f"{G}.nodes[0].keyword_arguments['alpha']",
        ),
        *((with_graph(outputs=(output,)), f"{G}.outputs[0]") for output in UNFIT_OUTPUTS),
        (region(False, SubgraphRef("inner"), NodeRef("x"), calls=2), f"{G}.subgraphs['inner']"),
        (region(False, SubgraphRef("inner"), NodeRef("x"), calls=0), f"{G}.subgraphs['inner']"),
        (with_graph(outputs=(NodeRef("nothing"),)), f"{G}.outputs[0]"),
        (with_variant(output_structure=None), f"{V}.output_structure"),
        (with_variant(output_structure=(LeafRef(0), LeafRef(0))), f"{V}.output_structure"),
        (with_variant(input_structure=LeafRef(1)), f"{V}.input_structure"),
        (with_variant(graph_inputs=(GraphInput("tensor", "v"), GraphInput("input", 0))), f"{V}.graph_inputs[0]"),
        (with_variant(graph_inputs=(GraphInput("tensor", "w"), GraphInput("input", 1))), f"{V}.graph_inputs[1]"),
        (with_variant(graph_inputs=(GraphInput("tensor", "w"), GraphInput("target", 0))), f"{V}.graph_inputs[1]"),
        (with_variant(input_leaves=(ConstantSpec(3),)), f"{V}.graph_inputs[1]"),
        (with_variant(symbols=()), f"{V}.input_leaves[0].shape"),
        (with_variant(symbols=(Symbol("rows", min=3, max=2),)), f"{V}.symbols[0]"),
        (with_variant(input_leaves=(TensorSpec("float8", ("rows", 3)),)), f"{V}.input_leaves[0].dtype"),
        (with_variant(loss_graph=GRAPH), f"{V}.loss_graph_inputs"),
        (with_variant(weight_graph=GRAPH), f"{V}.weight_graph_inputs"),
        (with_variant(weight_graph_inputs=(GraphInput("input", 0),)), f"{V}.weight_graph_inputs"),
        (
            with_variant(weight_graph=GRAPH, weight_graph_inputs=(GraphInput("output", 0), GraphInput("tensor", "w"))),
            f"{V}.weight_graph_inputs[0]",
        ),
        (
            with_variant(
                weight_graph=replace(GRAPH, outputs=()),
                weight_graph_inputs=(GraphInput("input", 0), GraphInput("tensor", "w")),
            ),
            f"{V}.weight_graph.outputs",
        ),
        (region(False, SubgraphRef("other"), NodeRef("x")), f"{G}.nodes[0].arguments[1]"),
        (region(False, SubgraphRef("inner")), f"{G}.nodes[0].arguments"),
        (region(False), f"{G}.nodes[0]"),
        (with_tensors(WEIGHT), "program.tensors[1].name"),
        (with_tensors(replace(WEIGHT, name="b", role="weight")), "program.tensors[1].role"),
        (with_tensors(replace(WEIGHT, name="b", dtype="int64")), "program.tensors[1].requires_grad"),
        (with_tensors(replace(WEIGHT, name="b", shape=(-1,))), "program.tensors[1].shape"),
        (with_tensors(replace(WEIGHT, name="b", alias_of="c")), "program.tensors[1].alias_of"),
        (with_tensors(replace(WEIGHT, name="b", alias_of="w", shape=(4,))), "program.tensors[1].alias_of"),
    ],
)
def test_a_malformed_program_is_refused_with_the_field(program, field):
    with pytest.raises(InvalidArgument) as caught:
        check_program(program)
    assert caught.value.field == field and caught.value.reason == "GRAPH_MALFORMED"


@pytest.mark.parametrize(
    "operator", ["aten.from_file.default", "os.system", "aten.empty.memory_format", "builtins.eval"]
)
def test_an_operator_outside_the_allowlist_is_named(operator):
    with pytest.raises(InvalidArgument, match=operator) as caught:
        check_program(with_node(operator=operator))
    assert caught.value.reason == "OPERATOR_NOT_ALLOWED" and caught.value.field == f"{G}.nodes[0].operator"


def test_an_operator_without_its_schema_is_refused():
    with pytest.raises(InvalidArgument, match="no schema"):
        check_program(replace(PROGRAM, operators={}))


def test_operators_of_subgraphs_are_checked_and_counted():
    bad = Graph(inputs=("a",), nodes=(Node("n", "os.system", ()),), outputs=())
    node = Node("sum", "higher_order.wrap_with_set_grad_enabled", (False, SubgraphRef("inner"), NodeRef("x")))
    program = with_graph(nodes=(node,), subgraphs={"inner": bad})
    with pytest.raises(InvalidArgument, match=r"os\.system"):
        check_program(program)
    with pytest.raises(ResourceExhausted, match="graph_nodes"):
        check_program(program, limits=Limits(graph_nodes=1))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(graph_nodes=0), "GRAPH_TOO_LARGE"),
        (Limits(model_bytes=11), "MODEL_TOO_LARGE"),
        (Limits(variants=0), "TOO_MANY_VARIANTS"),
    ],
)
def test_limits_are_kept_and_named(limits, reason):
    with pytest.raises(ResourceExhausted, match="the limit") as caught:
        check_program(PROGRAM, limits=limits)
    assert caught.value.reason == reason
