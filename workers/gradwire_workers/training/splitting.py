"""How the batches of a variant may be spread over the ranks, its loss included: found out once, when it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import torch

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import GraphLossSpec, OutputLossSpec, Variant
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.programs.alike import are_alike
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.sharding import least_rows
from gradwire_workers.training.loss_proof import all_is_row_by_row, moved_coefficients, shape_of_loss, why_parts_depend
from gradwire_workers.training.loss_shape import LossShape
from gradwire_workers.training.loss_weights import LossWeight, given_weight, weights_to_try
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_check import why_rows_depend
from gradwire_workers.training.row_examples import changed, repeated, rows_to_try
from gradwire_workers.training.snapshots import Snapshot
from gradwire_workers.training.time_left import OutOfTimeError, TimeLeft
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


_OUT_OF_TIME = (
    "to find out whether rows are independent, and what the loss is over them, takes longer than a client is let wait"
)


def find_split(
    replica: Replica, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any], *, seconds: float = inf
) -> RowsReport:
    """Why the variant's batches must not be split, or what its loss is over the rows; makes the replica combine it so.

    inputs, targets: an example's leaves. seconds: how long it may take, about; what is not proven by then must not be
    split. Every rank calls it and gets the same answer.
    """
    time_left = TimeLeft(seconds, replica.groups)
    try:
        if replica.groups is None:
            return _tried_alone(replica, variant_name, inputs, targets, time_left)
        # All else must be exact where batch norm is not: that is found with one that is.
        with replica.synchronised():
            found = _tried(replica, variant_name, inputs, targets, time_left)
        return replace(found, own_statistics=found.reason is None and replica.normalises_apart(variant_name))
    except OutOfTimeError:
        # One rank splits nothing.
        return RowsReport(reason=None if replica.groups is None else _OUT_OF_TIME)


def split_like(replica: Replica, variant_name: str, other_name: str, found: RowsReport) -> RowsReport | None:
    """What `find_split` has just found for another variant, where it would do all the same for this one.

    None where it would not: the graphs differ in more than random operators being on. Every rank gets the same answer.
    """
    if isinstance(replica.program, ArchitectureProgram):
        return None
    variant, other = replica.program.variant(variant_name), replica.program.variant(other_name)
    if not are_alike(variant, other, replica.graphs.program.operators):
        return None
    if (weight := replica.weight_of(other_name)) is not None:
        replica.weigh(variant_name, given_weight(replica.graphs, variant, replica.spec.loss_reduction) or weight)
    return found


def _tried(
    replica: Replica, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any], time_left: TimeLeft
) -> RowsReport:
    variant = replica.program.variant(variant_name)
    proven = _proven_together(replica, variant, inputs, time_left)
    reason = None if proven is not None else why_rows_depend(replica, variant_name, inputs, time_left)
    if reason is not None or replica.spec.loss is None:
        return RowsReport(reason=reason)
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
    shape = proven
    if shape is None and (given is None or isinstance(replica.spec.loss, (OutputLossSpec, GraphLossSpec))):
        shape = shape_of_loss(replica, variant)
        not_proven = shape.reason or why_parts_depend(replica, variant, inputs, targets, shape, time_left)
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
    more = rows_to_try(variant, rows + replica.groups.size)
    found = find_weight(wide, variant, inputs, targets, weights, rows=rows, more=more, time_left=time_left)
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


def _proven_together(
    replica: Replica, variant: Variant, inputs: Sequence[Any], time_left: TimeLeft
) -> LossShape | None:
    """How the loss that the variant returns is made of rows, where that and its outputs were proven in one go."""
    if isinstance(replica.program, ArchitectureProgram) or not isinstance(replica.spec.loss, OutputLossSpec):
        return None
    try:
        if not _returns_loss(replica, variant, inputs):
            return None
    except GradwireError:
        return None  # the outputs' own check says what is the matter
    shape = shape_of_loss(replica, variant)
    return shape if all_is_row_by_row(replica, variant, inputs, shape, time_left) else None


def _tried_alone(
    replica: Replica, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any], time_left: TimeLeft
) -> RowsReport:
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
    if given is None or holds_alone(wide, variant, inputs, targets, given, time_left):
        return nothing
    return RowsReport(reason=None, wrong=_is_not(given))


def _is_not(given: LossWeight) -> str:
    return f"the loss of a batch is not {given.words}"


def _returns_loss(replica: Replica, variant: Variant, inputs: Sequence[Any]) -> bool:
    """Whether the variant returns the loss: one without the targets for it may not."""
    rows = rows_to_try(variant, 2)
    leaves = changed(repeated, variant, inputs, rows)
    before = Snapshot(replica.program.mutated_buffers(variant.name))
    try:
        with torch.no_grad():
            return replica.has_own_loss(replica.program(variant.name, *leaves))
    finally:
        before.restore()
