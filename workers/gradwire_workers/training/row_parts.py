"""The values that a loss sums over rows, as outputs of a program of their own: to be looked at row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gradwire_proto.operators import schema_of
from gradwire_proto.values import (
    ROWS,
    Argument,
    Graph,
    GraphInput,
    LeafRef,
    Node,
    NodeRef,
    Program,
    TensorSpec,
    Variant,
)
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.replica import Replica

_SIZE, _SHAPED, _ADDED = "aten.sym_size.int", "aten.reshape.default", "aten.add.Tensor"
_SOMETHING = 0.7310585786300049


def with_outputs_of(
    replica: Replica, variant: Variant, names: Sequence[str], *, beside: Sequence[Argument] = ()
) -> Replica:
    """The replica's variant with these values of its graph for outputs, each with a row of numbers for each row.

    beside: outputs of the graph that are put before them, as they are.
    """
    assert variant.graph is not None
    first = next(
        name
        for name, each in zip(variant.graph.inputs, variant.graph_inputs, strict=True)
        if each.kind == "input" and has_rows(variant.input_leaves[int(each.key)])
    )
    # Made at the front: a graph may change its inputs.
    nodes = [Node("size_of_rows", _SIZE, (NodeRef(first), 0)), *variant.graph.nodes]
    for index, name in enumerate(names):
        nodes.append(Node(f"row_part_{index}", _SHAPED, (NodeRef(name), [NodeRef("size_of_rows"), -1])))
    outputs = (*beside, *(NodeRef(f"row_part_{index}") for index in range(len(names))))
    graph = replace(variant.graph, nodes=tuple(nodes), outputs=outputs)
    structure = tuple(LeafRef(index) for index in range(len(outputs)))
    made = replace(
        variant, graph=graph, output_structure=structure, loss_graph=None, loss_graph_inputs=(), weight_graph=None,
        weight_graph_inputs=(), target_structure=None, target_leaves=(),
    )  # fmt: skip
    return _of_variant(replica, made)


def loss_as_variant(variant: Variant, outputs: Sequence[Any], targets: Sequence[Any]) -> Variant:
    """A variant whose graph is the loss graph: its inputs are like these outputs and targets, of any number of rows."""
    assert variant.loss_graph is not None
    specs = [_like(each) for each in outputs if isinstance(each, Tensor)]
    fixed = [
        _like(target) if isinstance(target, Tensor) and has_rows(spec) else spec
        for spec, target in zip(variant.target_leaves, targets, strict=True)
    ]
    shift = {"output": 0, "target": len(outputs)}
    bound = tuple(
        each if each.kind == "tensor" else GraphInput("input", int(each.key) + shift[each.kind])
        for each in variant.loss_graph_inputs
    )
    leaves = (*specs, *fixed)
    return replace(
        variant,
        graph=variant.loss_graph,
        graph_inputs=bound,
        input_leaves=leaves,
        input_structure=tuple(LeafRef(index) for index in range(len(leaves))),
        symbols=tuple(each for each in variant.symbols if each.name == ROWS),
    )


def _like(tensor: Tensor) -> TensorSpec:
    return TensorSpec(str(tensor.dtype).removeprefix("torch."), (ROWS, *tensor.shape[1:]))


def with_something_added(graph: Graph, common: Sequence[str], steps: frozenset[str]) -> Graph:
    """The graph with other values of what counts the sums over rows, where these steps read them.

    What is zero for now (a schedule that has not begun) hides nothing then.
    """
    made = {name: f"{name}_and_something" for name in common}
    nodes: list[Node] = [_more(name, made[name]) for name in graph.inputs if name in made]
    for node in graph.nodes:
        if node.name in steps:
            node = replace(node, arguments=tuple(_renamed(each, made) for each in node.arguments))
        nodes.append(node)
        if node.name in made:
            nodes.append(_more(node.name, made[node.name]))
    return replace(graph, nodes=tuple(nodes))


def with_operators(program: Program) -> Program:
    """The program, which may name the operators that are put into its graphs here."""
    added = {name: schema_of(name) for name in (_SIZE, _SHAPED, _ADDED)}
    return replace(program, operators={**program.operators, **added})


def _more(name: str, made: str) -> Node:
    return Node(made, _ADDED, (NodeRef(name), _SOMETHING))


def _renamed(argument: Any, names: dict[str, str]) -> Any:
    return NodeRef(names.get(argument.name, argument.name)) if isinstance(argument, NodeRef) else argument


def _of_variant(replica: Replica, variant: Variant) -> Replica:
    program = with_operators(replace(replica.graphs.program, variants=(variant,)))
    spec = replace(replica.spec, program=program, loss=None, sync_batch_norm=True)
    copy = Replica(spec, replica.program.all_state(), replica.rank, replica.device, replica.limits)
    copy.groups = replica.groups
    return copy
