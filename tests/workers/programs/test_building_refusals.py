"""A rank builds nothing from a program that is wrong, too large, or made by another PyTorch's operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.operators import schema_of
from gradwire_proto.values import Limits, Node, NodeRef, RankDevice
from gradwire_workers.programs import add_variant, build_program


class Outer(nn.Module):
    """rows x rows results: how large they are depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = self.linear(x)
        return (h @ h.T).sum(1)


@pytest.fixture
def exported():
    return ModuleExporter(nn.Linear(4, 2)).export_model(torch.randn(3, 4))


def state_of(exported):
    return {name: tensor.clone() for name, tensor in exported.tensors.items()}


def with_nodes(program, *nodes: Node, operators=None):
    train = program.variants[0]
    graph = replace(train.graph, nodes=(*train.graph.nodes, *nodes))
    return replace(
        program,
        variants=(replace(train, graph=graph), *program.variants[1:]),
        operators={**program.operators, **(operators or {})},
    )


def refused(program, state, **options):
    with pytest.raises((InvalidArgument, ResourceExhausted)) as caught:
        build_program(program, state, **options)
    return caught.value


def test_an_operator_outside_the_allowlist_is_not_built(exported):
    node = Node("bad", "aten.from_file.default", ("/etc/passwd",))
    assert refused(with_nodes(exported.program, node), state_of(exported)).reason == "OPERATOR_NOT_ALLOWED"


def test_a_schema_of_another_pytorch_is_refused_with_both(exported):
    schema = "aten::linear(Tensor input, Tensor weight, Tensor? bias=None, int magic=0) -> Tensor"
    program = replace(exported.program, operators={**exported.program.operators, "aten.linear.default": schema})
    error = refused(program, state_of(exported))
    assert error.reason == "SCHEMA_MISMATCH" and "int magic=0" in error.message and torch.__version__ in error.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("weight"), "TENSOR_MISSING"),
        (lambda state: state.update(weight=torch.randn(4, 2)), "TENSOR_MISMATCH"),
        (lambda state: state.update(weight=torch.randn(2, 4).double()), "TENSOR_MISMATCH"),
        (lambda state: state.update(other=torch.randn(2)), "TENSOR_UNKNOWN"),
    ],
)
def test_tensors_must_be_those_of_the_program(exported, change, reason):
    state = state_of(exported)
    change(state)
    assert refused(exported.program, state).reason == reason


def test_a_result_above_the_limit_is_refused_before_it_is_made(exported):
    node = Node("huge", "aten.zeros.default", ([1 << 20, 1 << 20],), {"device": RankDevice()})
    program = with_nodes(exported.program, node, operators={"aten.zeros.default": schema_of("aten.zeros.default")})
    error = refused(program, state_of(exported))
    assert (
        error.reason == "TENSOR_TOO_LARGE" and "tensor_bytes" in error.message and "aten.zeros.default" in error.message
    )


def test_a_batch_that_makes_results_too_large_is_refused_and_smaller_ones_go_on():
    exported = ModuleExporter(Outer()).export_model(torch.randn(3, 4))
    built = build_program(exported.program, state_of(exported), limits=Limits(tensor_bytes=1 << 20))
    built("train", torch.randn(100, 4))
    with pytest.raises(ResourceExhausted, match="tensor_bytes"):
        built("train", torch.randn(1000, 4))
    assert built("train", torch.randn(500, 4))[0].shape == (500,)


def test_arguments_that_an_operator_refuses_are_named(exported):
    node = Node("bad", "aten.view.default", (NodeRef("linear"), [7, 7]))
    program = with_nodes(
        exported.program,
        node,
        operators={"aten.view.default": "aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)"},
    )
    error = refused(program, state_of(exported))
    assert error.reason == "GRAPH_FAILS" and "aten.view.default" in error.message


def test_names_of_the_client_never_become_code(exported):
    train = exported.program.variants[0]
    evil = "x); __import__('os').system('touch /tmp/gradwire-was-here'); ("
    graph = replace(
        train.graph,
        inputs=("self.weight", "lambda", evil),
        nodes=(Node("import os\n", "aten.linear.default", (NodeRef(evil), NodeRef("self.weight"), NodeRef("lambda"))),),
        outputs=(NodeRef("import os\n"),),
    )
    program = replace(exported.program, variants=(replace(train, graph=graph),))
    x, state = torch.randn(5, 4), state_of(exported)
    built = build_program(program, state)
    assert torch.equal(built("train", x)[0], nn.functional.linear(x, state["weight"], state["bias"]))
    assert evil not in built._runs["train"].module.code


def test_adding_a_variant_is_all_or_nothing(exported):
    built = build_program(exported.program, state_of(exported))
    variant = replace(exported.program.variants[0], name="train-2")
    view = Node("bad", "aten.view.default", (NodeRef("linear"), [7, 7]))
    broken = replace(variant, graph=replace(variant.graph, nodes=(*variant.graph.nodes, view)))
    schemas = {"aten.view.default": "aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)"}
    before = built.program
    with pytest.raises(InvalidArgument):
        add_variant(built, broken, (), {}, schemas)
    assert built.program == before
    add_variant(built, variant, (), {}, {})
    assert torch.equal(built("train-2", torch.ones(1, 4))[0], built("train", torch.ones(1, 4))[0])
    with pytest.raises(InvalidArgument, match="train-2"):
        add_variant(built, variant, (), {}, {})


def test_a_variant_added_later_brings_its_constants():
    class Adds(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.shifts[x.dim()]

    module = Adds(4, 2)
    module.shifts = {2: torch.randn(2), 3: torch.randn(2)}
    exporter = ModuleExporter(module)
    exported = exporter.export_model(torch.randn(3, 4))
    built = build_program(exported.program, state_of(exported))
    more = exporter.export_variant(torch.randn(3, 2, 4), training=True, name="more")
    values = {name: tensor.clone() for name, tensor in more.values.items()}
    add_variant(built, more.variant, more.tensors, values, more.operators)
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(built("more", x)[0], module(x))


def test_an_unknown_variant_is_refused(exported):
    built = build_program(exported.program, state_of(exported))
    with pytest.raises(InvalidArgument, match="nothing"):
        built("nothing", torch.ones(1, 4))
    with pytest.raises(InvalidArgument, match="loss graph"):
        built.loss("train", [torch.ones(1)], [])
