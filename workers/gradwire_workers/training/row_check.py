"""Whether the rows of a batch are independent, so that ranks may compute some each: found by trying.

With numbers, which show everything but what numbers of another kind would do; and with marks, which show what reaches
what whatever the numbers are, but not what depends on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.autocast import AUTOCAST_TYPES
from gradwire_proto.values import Variant
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows, least_rows, row_range, smallest_share
from gradwire_workers.training.closeness import are_close
from gradwire_workers.training.gradients import add_up
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_examples import changed, random_like, repeated, rows_to_try, shuffled
from gradwire_workers.training.row_pass import RowsMissingError, is_not_taken, run_pass, trainable_of, weights_of_rows
from gradwire_workers.training.row_reach import where_rows_reach
from gradwire_workers.training.row_reasons import (
    BUFFERS,
    GRADIENTS,
    OTHER_OUTPUTS,
    OUTPUTS,
    REASONS,
    REFUSED,
    SHAPE,
    TOO_SMALL,
)
from gradwire_workers.training.time_left import TimeLeft
from gradwire_workers.training.trainable import differentiable_parameters, set_trained, trained_parameters


def why_rows_depend(replica: Replica, variant_name: str, inputs: Sequence[Any], time_left: TimeLeft) -> str | None:
    """None if a batch that is split over the ranks gives what the whole batch gives; otherwise why not, in words.

    Runs the variant on the example's leaves and on random ones like them, whole and split over all ranks, random
    operators off, and compares outputs (but for a loss among them), gradients and changed buffers. Then follows a row
    through it and back. Every rank calls it and gets the same answer, or OutOfTimeError.
    """
    groups = replica.groups
    assert groups is not None
    variant = replica.program.variant(variant_name)
    # Uneven parts of several rows: what depends on the number of rows must not be hidden.
    least = max(least_rows(variant), 2)
    rows = rows_to_try(variant, least * groups.size + 1)
    if smallest_share(rows, groups.size) < least_rows(variant):
        return REASONS[TOO_SMALL]
    found = torch.zeros(1, dtype=torch.uint8)
    with replica.program.without_randomness(), _all_trained(replica):
        changes = [repeated, random_like]
        for change in changes:
            leaves = changed(change, variant, inputs, rows)
            for scale in _scales(replica, variant):
                time_left.check()
                found[0] = _difference(replica, groups, variant, leaves, rows, scale)
                groups.all_reduce(found, largest=True)
                if found.item():
                    break
            if found.item() == REFUSED and change is not repeated:
                if change is random_like:
                    changes.append(shuffled)
                found.zero_()
            if found.item():
                break
        else:
            time_left.check()
            found[0] = where_rows_reach(replica, variant, inputs, changes[-1])
            groups.all_reduce(found, largest=True)
    return REASONS[int(found.item())]


@contextmanager
def _all_trained(replica: Replica) -> Iterator[None]:
    """Inside, parameters that are frozen now require gradients too: they may be unfrozen."""
    parameters = replica.program.parameters_by_name()
    trained = trained_parameters(replica.program)
    set_trained(parameters, differentiable_parameters(replica.program))
    try:
        yield
    finally:
        set_trained(parameters, trained)


def _scales(replica: Replica, variant: Variant) -> tuple[float, ...]:
    """How large the gradients are that are tried.

    The backward of a custom function need not be linear (it may clip): then the gradients of parts add up to those of
    the whole where they are small, and not where they are large; and what counts nothing may still have a gradient.
    """
    if not replica.program.has_functions(variant.name):
        return (1.0,)
    # What is larger or smaller than these is infinite or zero in float16.
    return (1.0, 1e-2, 1e2, 0.0) if replica.precision == "fp16" else (1.0, 1e-6, 1e-3, 1e3, 1e6, 0.0)


def _difference(
    replica: Replica, groups: ProcessGroups, variant: Variant, leaves: list[Any], rows: int, scale: float
) -> int:
    """Index of the reason for which this rank sees that whole and parts differ; 0 if it sees none."""
    whole = Shard(variant=variant.name, rows=rows, start=0, stop=rows, whole=True, inputs=tuple(leaves), targets=())
    start, stop = row_range(rows, groups.size, groups.rank)
    mine = slice(start, stop) if stop > start else slice(0, 1)
    cut = [leaf[mine] if has_rows(spec) else leaf for leaf, spec in zip(leaves, variant.input_leaves, strict=True)]
    part = Shard(variant=variant.name, rows=rows, start=start, stop=stop, inputs=tuple(cut), targets=())

    def weights(index: int, output: Tensor) -> Tensor:
        return weights_of_rows(index, output) * scale

    try:
        expected = run_pass(replica, whole, weights)
    except Exception as error:
        if not is_not_taken(error):
            raise
        return REFUSED  # all ranks see that, too
    if any(output.dim() == 0 or output.shape[0] != rows for output in expected.outputs):
        return SHAPE  # all ranks see that, so none goes on to the collectives
    counts = 1.0 if part.count else 0.0

    def have_rows(outputs: list[Tensor]) -> bool:
        # The whole's may have had as many entries by chance. All ranks agree before a backward has them wait.
        misfits = any(output.dim() == 0 or output.shape[0] != mine.stop - mine.start for output in outputs)
        return not groups.all_reduce(torch.tensor([misfits], dtype=torch.uint8), largest=True).item()

    try:
        found = run_pass(
            replica, part, lambda index, _: weights(index, expected.outputs[index])[mine] * counts, have_rows
        )
    except RowsMissingError:
        return SHAPE

    trainable = trainable_of(replica)
    shared = [index for index in expected.inputs if not has_rows(variant.input_leaves[index])]
    like = [*trainable, *(leaves[index] for index in shared)]
    summed = add_up([*found.parameters, *(found.inputs[index] for index in shared)], like, groups)
    pairs = list(zip(summed, [*expected.parameters, *(expected.inputs[index] for index in shared)], strict=True))
    for index in expected.inputs:
        if index not in shared and part.count:
            reference = expected.inputs[index]
            pairs.append((found.inputs[index], None if reference is None else reference[mine]))
    computed_in = AUTOCAST_TYPES.get(replica.precision)
    outputs = zip(found.outputs, (reference[mine] for reference in expected.outputs), strict=True)
    if part.count and not are_close(list(outputs), computed_in):
        return OUTPUTS
    if part.count and not all(map(_same, found.others, expected.others)):
        return OTHER_OUTPUTS
    # What counts nothing must have no gradient: a rank without rows computes one row that does not count.
    if not are_close(pairs, computed_in) or (scale == 0 and any(_is_nonzero(reference) for _, reference in pairs)):
        return GRADIENTS
    if not are_close(list(zip(found.buffers, expected.buffers, strict=True)), computed_in):
        return BUFFERS
    return 0


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)
