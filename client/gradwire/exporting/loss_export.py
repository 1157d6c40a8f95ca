"""The loss of a module's outputs and targets as a graph, and which output is the loss where the module returns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradwire.exporting.example import Example
from gradwire.exporting.graph_run import as_scalar
from gradwire.exporting.lengths import output_openings, rows_symbol
from gradwire.exporting.loss_mapping import Loss
from gradwire.exporting.output_tree import OutputTree
from gradwire.exporting.traced_graph import Constants, TracedGraph, trace_graph
from gradwire.exporting.tracing import ROWS_OPEN, Openings, explain
from gradwire_proto.errors import GradwireError
from gradwire_proto.values import GraphInput, unflatten


def export_loss(
    loss: Loss,
    example: Example,
    tree: OutputTree,
    outputs: Sequence[Any],
    forward: TracedGraph,
    *,
    lengths: bool,
    constants: Constants,
    operators: dict[str, str],
    trained: Mapping[str, Tensor],
    restore: Callable[[], None],
    precision: str,
) -> TracedGraph | None:
    """The graph of a loss, over the leaves of outputs and targets; None where the service computes it by name.

    tree, outputs: what the module gave on the example, and forward: the graph that gives them. lengths: whether sizes
    besides rows may vary. trained: the tensors that the loss must not read. restore: undoes what a run left behind.
    """
    if loss.fits(list(outputs), list(example.targets)):
        return None
    outputs, targets = list(outputs), list(example.targets)
    leaves = _leaves(example, outputs, forward, lengths=lengths)
    places = [(outputs if binding.kind == "output" else targets, int(binding.key)) for binding, _, _ in leaves]

    def flat_loss(*tensors: Tensor) -> Sequence[Any]:
        for (values, index), tensor in zip(places, tensors, strict=True):
            values[index] = tensor
        return (as_scalar(loss.function(tree.unflatten(outputs), unflatten(example.target_structure, targets))),)

    try:
        return trace_graph(
            flat_loss,
            loss.module,
            leaves,
            state={},
            constants=constants,
            operators=operators,
            subject="the loss",
            trained=trained,
            restore=restore,
            precision=precision,
        )
    except GradwireError:
        raise
    except Exception as error:
        if example.rows is not None:
            # Perhaps with fixed sizes.
            raise
        raise explain(error, "the loss") from error
    finally:
        restore()


def loss_leaf(tree: OutputTree, outputs: Sequence[Any]) -> int | None:
    """The output that is the loss: the only one, or `.loss`, or ["loss"]."""
    output = tree.unflatten(list(outputs))
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if not isinstance(found, Tensor) or found.dim() > 0 or not found.is_floating_point():
        return None
    return next((index for index, leaf in enumerate(outputs) if leaf is found), None)


def _leaves(
    example: Example, outputs: Sequence[Any], forward: TracedGraph, *, lengths: bool
) -> list[tuple[GraphInput, Tensor, Openings]]:
    """What the graph takes: the tensors among outputs and targets, and which of their sizes vary."""
    rows = rows_symbol(example, forward.sizes) if lengths else None
    leaves = [
        (GraphInput("output", index), leaf, output_openings(shape, rows) if rows else _rows_lead(shape))
        for index, (leaf, shape) in enumerate(zip(outputs, forward.sizes.outputs, strict=True))
        if isinstance(leaf, Tensor) and shape is not None
    ]
    return leaves + [
        (GraphInput("target", index), leaf, example.openings(leaf, lengths=lengths))
        for index, leaf in enumerate(example.targets)
        if isinstance(leaf, Tensor)
    ]


def _rows_lead(shape: Sequence[Any]) -> Openings:
    """Whether the batch's rows are dimension 0 of an output, where no other size may vary."""
    return {0: ROWS_OPEN} if shape and not isinstance(shape[0], int) else {}
