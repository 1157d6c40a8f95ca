"""What a message says of functions with their own backward is measured, and does no harm: errors, and nothing worse."""

from __future__ import annotations

import pytest
import torch

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.operators import schema_of
from gradwire_proto.values import (
    CustomFunction,
    DTypeRef,
    FunctionRef,
    Graph,
    GraphInput,
    LeafRef,
    Limits,
    Node,
    NodeRef,
    Program,
    RankDevice,
    StateTensor,
    Symbol,
    TensorSpec,
    Variant,
)
from gradwire_workers.programs import build_program
from gradwire_workers.programs.sync_batch_norm import SyncBatchNorm

X, G, W = NodeRef("x"), NodeRef("g"), NodeRef("w")


def node(name: str, operator: str, *arguments, **keywords) -> Node:
    return Node(name, operator, arguments, keywords)


BATCH_NORM = node("n", "aten.batch_norm.default", X, None, None, None, None, True, 0.1, 1e-5, False)
HUGE = node("z", "aten.zeros.default", [1 << 12, 1 << 12], device=RankDevice())


def build(*, forward=(), result="x", saved=(W,), backward=(), gradients=(G, None), shape=("rows", 4), limits=None):
    """A program whose only node calls a function of its input and its weight."""
    function = CustomFunction(
        forward=Graph(inputs=("x", "w"), nodes=tuple(forward), outputs=(NodeRef(result), *saved)),
        backward=Graph(
            inputs=("g", *(f"s{i}" for i in range(len(saved)))), nodes=tuple(backward), outputs=tuple(gradients)
        ),
        results=1,
        differentiable_results=(0,),
        differentiable_inputs=(0, 1),
    )
    graph = Graph(
        inputs=("x", "w"),
        nodes=(
            node("r", "higher_order.custom_function", FunctionRef("f"), X, W),
            node("y", "operator.getitem", NodeRef("r"), 0),
        ),
        outputs=(NodeRef("y"),),
        functions={"f": function},
    )
    variant = Variant(
        name="v",
        training=True,
        graph=graph,
        graph_inputs=(GraphInput("input", 0), GraphInput("tensor", "weight")),
        input_structure=LeafRef(0),
        input_leaves=(TensorSpec("float32", shape),),
        output_structure=LeafRef(0),
        symbols=(Symbol("rows"),),
    )
    names = {each.operator for each in (*forward, *backward) if each.operator.startswith("aten.")}
    program = Program(
        torch_version=torch.__version__,
        tensors=(StateTensor(name="weight", role="parameter", dtype="float32", shape=(4,), requires_grad=True),),
        variants=(variant,),
        operators={name: schema_of(name) for name in names},
    )
    return build_program(program, {"weight": torch.ones(4)}, limits=limits)


@pytest.mark.parametrize(
    "parts",
    [
        {"forward": (HUGE,)},
        {"backward": (HUGE,)},
        {
            "forward": (
                node("e", "aten.expand.default", X, [1 << 20, -1, 4]),
                node("c", "aten.clone.default", NodeRef("e")),
            )
        },
        {"backward": (node("e", "aten.repeat.default", G, [1 << 12, 1 << 12]),)},
        {"backward": (node("d", "aten.nonzero.default", G), HUGE)},
    ],
)
def test_sizes_inside_both_graphs_are_bounded_before_anything_runs(parts):
    with pytest.raises(ResourceExhausted) as caught:
        build(**parts, limits=Limits(tensor_bytes=1 << 20))
    assert caught.value.reason == "TENSOR_TOO_LARGE"


@pytest.mark.parametrize("side", ["forward", "backward"])
def test_sizes_inside_both_graphs_are_bounded_for_every_batch(side):
    rows = node("s", "aten.sym_size.int", X if side == "forward" else G, 0)
    square = node("z", "aten.zeros.default", [NodeRef("s"), NodeRef("s")], device=RankDevice())
    built = build(**{side: (rows, square)}, limits=Limits(tensor_bytes=1 << 20))
    built("v", torch.ones(100, 4))
    with pytest.raises(ResourceExhausted, match="tensor_bytes"):
        built("v", torch.ones(1000, 4))


def test_a_backward_is_measured_when_the_sizes_that_it_takes_are_known():
    found = node("i", "aten.nonzero.default", X), node("f", "aten.to.dtype", NodeRef("i"), DTypeRef("float32"))
    square = node("t", "aten.t.default", G), node("m", "aten.mm.default", G, NodeRef("t"))
    built = build(
        forward=found,
        result="f",
        backward=square,
        gradients=(None, None),
        limits=Limits(tensor_bytes=1 << 20),
    )
    for rows in (20, 40, 30):
        built("v", torch.ones(rows, 4))[0].sum().backward()
    with pytest.raises(ResourceExhausted, match="tensor_bytes"):
        built("v", torch.ones(400, 4))[0].sum().backward()


@pytest.mark.parametrize(
    "parts", [{"forward": (node("m", "aten.mm.default", X, W),)}, {"backward": (node("m", "aten.mm.default", G, G),)}]
)
def test_an_operator_that_refuses_its_sizes_is_named_when_the_program_is_built(parts):
    with pytest.raises(InvalidArgument, match="mm") as caught:
        build(**parts)
    assert caught.value.reason == "GRAPH_FAILS"


def test_a_result_that_is_no_tensor_is_refused():
    with pytest.raises(InvalidArgument, match="no tensor") as caught:
        build(forward=(node("s", "aten.sym_size.int", X, 0),), result="s", backward=())("v", torch.ones(3, 4))
    assert caught.value.reason == "PROGRAM_FAILED"


@pytest.mark.parametrize(
    "parts",
    [
        {"backward": (node("n", "aten.sym_size.int", G, 0),), "gradients": (NodeRef("n"), None)},
        {"saved": (2.5,), "gradients": (None, NodeRef("s0"))},
        {"backward": (node("t", "aten.t.default", G),), "gradients": (NodeRef("t"), None)},
        {"backward": (node("n", "aten.to.dtype", G, "int64"),), "gradients": (None, G)},
        {"saved": (True, "text", None), "gradients": (NodeRef("s1"), None)},
    ],
)
def test_gradients_that_do_not_fit_raise_an_error_and_nothing_worse(parts):
    def run():
        x = torch.randn(3, 4, requires_grad=True)
        build(**parts)("v", x)[0].sum().backward()

    with pytest.raises((InvalidArgument, RuntimeError, TypeError)):
        run()


def test_what_a_hostile_function_writes_is_known_to_be_written():
    built = build(
        forward=(node("a", "aten.add_.Tensor", W, 1),), backward=(node("b", "aten.add_.Tensor", NodeRef("s0"), 1),)
    )
    assert built.mutated_buffers("v") == [built.parameters_by_name()["weight"]]
    x = torch.ones(3, 4)
    built("v", x)
    assert torch.equal(x, torch.ones(3, 4))


def test_a_batchs_memory_is_not_a_functions_to_change():
    built = build(forward=(node("a", "aten.add_.Tensor", X, 1),), result="a")
    x = torch.ones(3, 4)
    assert torch.equal(built("v", x)[0], torch.full((3, 4), 2.0))
    assert torch.equal(x, torch.ones(3, 4))


def test_a_batch_norm_in_a_message_talks_to_the_other_ranks_inside_a_function_too():
    built = build(forward=(BATCH_NORM,), result="n")
    assert built.has_batch_norm("v")
    seen = []

    def batch_norm(*arguments):
        seen.append(arguments)
        return SyncBatchNorm().batch_norm(*arguments)

    built.replace_batch_norm(batch_norm)
    built("v", torch.randn(5, 4))
    assert len(seen) == 1


def test_a_backward_that_reads_more_rows_of_log_softmax_than_there_are_is_refused():
    def differentiate() -> None:
        built = build(
            backward=(
                node("v", "aten.unsqueeze.default", NodeRef("s0"), 0),
                node("l", "aten._log_softmax_backward_data.default", G, NodeRef("v"), 1, DTypeRef("float32")),
            ),
            gradients=(NodeRef("l"), None),
        )
        built("v", torch.randn(400, 4, requires_grad=True))[0].sum().backward()

    with pytest.raises(InvalidArgument, match="must have one shape"):
        differentiate()
