"""Whether a variant's loss is made of rows: read off its graph, and what it sums is shown to be row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import OutputLossSpec, Variant
from gradwire_workers.sharding import least_rows, row_range
from gradwire_workers.training.loss_shape import LossShape, loss_shape
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_check import why_rows_depend
from gradwire_workers.training.row_examples import changed, repeated, rows_to_try
from gradwire_workers.training.row_parts import loss_as_variant, with_outputs_of, with_something_added
from gradwire_workers.training.snapshots import Snapshot
from gradwire_workers.training.time_left import TimeLeft

_TOGETHER = "what the loss sums over rows depends on more than a row each"


def shape_of_loss(replica: Replica, variant: Variant) -> LossShape:
    """How the loss is made of rows: the one that the variant returns, or the one of its loss graph."""
    operators, spec = replica.graphs.program.operators, replica.spec.loss
    if isinstance(spec, OutputLossSpec):
        graph, bound = variant.graph, variant.graph_inputs
        place = spec.output_leaf
    else:
        graph, bound = variant.loss_graph, variant.loss_graph_inputs
        place = 0
    assert graph is not None
    leaves = {"input": variant.input_leaves, "target": variant.target_leaves}
    return loss_shape(graph, bound, leaves, operators, graph.outputs[place])


def why_parts_depend(
    replica: Replica,
    variant: Variant,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    shape: LossShape,
    time_left: TimeLeft,
) -> str | None:
    """Why what the loss sums is not row by row; None where it is. Every rank calls it and gets the same answer, or
    OutOfTimeError."""
    leaves = list(inputs)
    if not shape.rows:
        return None
    if not isinstance(replica.spec.loss, OutputLossSpec):
        rows = rows_to_try(variant, 3)
        with torch.no_grad(), replica.program.without_randomness():
            outputs = replica.program(variant.name, *changed(repeated, variant, inputs, rows))
        variant = loss_as_variant(variant, outputs, targets)
        leaves = [*outputs, *targets]
    try:
        parts = with_outputs_of(replica, variant, shape.rows)
    except GradwireError:
        return _TOGETHER
    if not _has_rows(parts, variant, leaves):
        return _TOGETHER
    why = why_rows_depend(parts, variant.name, leaves, time_left)
    return None if why is None else f"{_TOGETHER}: {why}"


def all_is_row_by_row(
    replica: Replica, variant: Variant, inputs: Sequence[Any], shape: LossShape, time_left: TimeLeft
) -> bool:
    """Whether the variant's outputs, and what the loss that is among them sums, are row by row: tried together.

    False tells nothing. Every rank calls it and gets the same answer, or OutOfTimeError.
    """
    spec = replica.spec.loss
    assert isinstance(spec, OutputLossSpec) and variant.graph is not None
    # The backward of a function may depend on how large all that comes to it is.
    if shape.reason is not None or not shape.rows or replica.program.has_functions(variant.name):
        return False
    beside = [output for place, output in enumerate(variant.graph.outputs) if place != spec.output_leaf]
    try:
        everything = with_outputs_of(replica, variant, shape.rows, beside=beside)
    except GradwireError:
        return False
    if not _has_rows(everything, variant, inputs):
        return False
    return why_rows_depend(everything, variant.name, inputs, time_left) is None


def _has_rows(parts: Replica, variant: Variant, leaves: Sequence[Any]) -> bool:
    """Whether the parts have as many numbers for each row in batches of every size that ranks will have."""
    assert parts.groups is not None
    size = parts.groups.size
    total = rows_to_try(variant, max(least_rows(variant), 2) * size + 1)
    shapes = set()
    for rows in {total, *(stop - start for start, stop in (row_range(total, size, rank) for rank in range(size)))}:
        before = Snapshot(parts.program.mutated_buffers(variant.name))
        try:
            with torch.no_grad(), parts.program.without_randomness():
                outputs = parts.program(variant.name, *changed(repeated, variant, leaves, max(rows, 1)))
        except (RuntimeError, IndexError, ValueError, GradwireError):
            return False
        finally:
            before.restore()
        shapes.add(tuple(tuple(each.shape[1:]) for each in outputs if isinstance(each, Tensor)))
    return len(shapes) == 1


def moved_coefficients(variant: Variant, shape: LossShape, *, own: bool) -> Variant:
    """The variant with other values of what all ranks have alike, where they count in its loss: `own`, or its graph."""
    graph = variant.graph if own else variant.loss_graph
    assert graph is not None
    moved = with_something_added(graph, shape.common, shape.steps)
    return replace(variant, graph=moved) if own else replace(variant, loss_graph=moved)
