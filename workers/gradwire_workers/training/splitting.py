"""How the batches of a variant may be spread over the ranks, its loss included: found out once, when it comes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gradwire_proto.values import GraphLossSpec, OutputLossSpec
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.sharding import least_rows
from gradwire_workers.training.loss_proof import moved_coefficients, shape_of_loss, why_parts_depend
from gradwire_workers.training.loss_weights import LossWeight, given_weight, weights_to_try
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_check import why_rows_depend
from gradwire_workers.training.row_examples import changed, repeated, rows_to_try
from gradwire_workers.training.snapshots import Snapshot
from gradwire_workers.training.weight_alone import holds_alone
from gradwire_workers.training.weight_check import find_weight
from gradwire_workers.training.widening import widened

_NO_WEIGHT = (
    "the loss that the model returns is no sum over rows, and no mean over rows or targets that could be found by"
    " trying: give loss_weight, or return what the loss is made of"
)


_NOT_TRIED = (
    "the module returns its loss, a scalar: whether it is a sum or mean over rows is tried where a module was exported,"
    " not where it is built by name"
)


def find_split(replica: Replica, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any]) -> RowsReport:
    """Why the variant's batches must not be split, or what its loss is over the rows; makes the replica combine it so.

    inputs, targets: an example's leaves. Every rank calls it and gets the same answer.
    """
    if replica.groups is None:
        return _tried_alone(replica, variant_name, inputs, targets)
    reason = why_rows_depend(replica, variant_name, inputs)
    if reason is not None or replica.spec.loss is None:
        return RowsReport(reason=reason)
    variant = replica.program.variant(variant_name)
    if isinstance(replica.program, ArchitectureProgram):
        by_itself = isinstance(replica.spec.loss, OutputLossSpec) and _returns_loss(replica, variant, inputs)
        return RowsReport(reason=_NOT_TRIED if by_itself else None)
    given = given_weight(replica.graphs, variant, replica.spec.loss_reduction)
    if given is None and not (
        isinstance(replica.spec.loss, OutputLossSpec) and _returns_loss(replica, variant, inputs)
    ):
        return RowsReport(reason=None)
    if given is not None and variant.target_leaves and not targets:
        return RowsReport(reason="the example has no targets to try the loss with")
    assert replica.groups is not None
    shape = None
    if given is None or isinstance(replica.spec.loss, (OutputLossSpec, GraphLossSpec)):
        shape = shape_of_loss(replica, variant)
        not_proven = shape.reason or why_parts_depend(replica, variant, inputs, targets, shape)
        if not_proven is not None:
            return RowsReport(reason=not_proven, wrong=None if given is None else not_proven)
    own = isinstance(replica.spec.loss, OutputLossSpec)
    change = None if shape is None else partial(moved_coefficients, shape=shape, own=own)
    wide = widened(replica, variant_name, change)
    rows = rows_to_try(variant, max(least_rows(variant), 2) * replica.groups.size + 1)
    if given is None:
        names, weights = weights_to_try(replica.graphs, variant), weights_to_try(wide.graphs, variant)
    else:
        wide_one = given_weight(wide.graphs, wide.graphs.variant(variant_name), replica.spec.loss_reduction)
        assert wide_one is not None
        names, weights = [given], [wide_one]
    found = find_weight(
        wide, variant, inputs, targets, weights, rows=rows, more=rows_to_try(variant, rows + replica.groups.size)
    )
    if found is None:
        wrong = None if given is None else _is_not(given)
        return RowsReport(reason=wrong or _NO_WEIGHT, wrong=wrong)
    replica.weigh(variant_name, names[found])
    return RowsReport(
        reason=None,
        loss=names[found].words,
        inputs_whole=bool(names[found].reads),
        returns_loss=isinstance(replica.spec.loss, OutputLossSpec),
        weight=names[found].key,
    )


def _tried_alone(replica: Replica, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any]) -> RowsReport:
    """On one rank: what the client said of the loss must hold there too, so that more ranks bring no surprise."""
    nothing = RowsReport(reason=None)
    if replica.spec.loss is None or isinstance(replica.program, ArchitectureProgram):
        return nothing
    variant = replica.program.variant(variant_name)
    if variant.target_leaves and not targets:
        return nothing
    if given_weight(replica.graphs, variant, replica.spec.loss_reduction) is None:
        return nothing
    if isinstance(replica.spec.loss, (OutputLossSpec, GraphLossSpec)):
        not_proven = shape_of_loss(replica, variant).reason
        if not_proven is not None:
            return RowsReport(reason=None, wrong=not_proven)
    wide = widened(replica, variant_name)
    given = given_weight(wide.graphs, wide.graphs.variant(variant_name), replica.spec.loss_reduction)
    if given is None or holds_alone(wide, variant, inputs, targets, given):
        return nothing
    return RowsReport(reason=None, wrong=_is_not(given))


def _is_not(given: LossWeight) -> str:
    return f"the loss of a batch is not {given.words}"


def _returns_loss(replica: Replica, variant: Any, inputs: Sequence[Any]) -> bool:
    """Whether the variant returns the loss: one without the targets for it may not."""
    rows = rows_to_try(variant, 2)
    leaves = changed(repeated, variant, inputs, rows)
    before = Snapshot(replica.program.mutated_buffers(variant.name))
    try:
        with torch.no_grad():
            return replica.has_own_loss(replica.program(variant.name, *leaves))
    finally:
        before.restore()
