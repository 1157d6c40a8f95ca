"""Whether the rows of a batch are independent, so that ranks may compute some each: found by trying.

With numbers, which show everything but what numbers of another kind would do; and with marks, which show what reaches
what whatever the numbers are, but not what depends on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.autocast import AUTOCAST_TYPES
from gradwire_proto.errors import GradwireError, InvalidArgument
from gradwire_proto.values import ROWS, Variant
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows, least_rows, row_range, smallest_share
from gradwire_workers.training.closeness import are_close, has_rounding
from gradwire_workers.training.failures import as_program_failure
from gradwire_workers.training.gradients import add_up
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_examples import Change, changed, random_like, repeated, rows_to_try, shuffled
from gradwire_workers.training.row_marks import MarkedRow, rows_to_mark
from gradwire_workers.training.snapshots import Snapshot
from gradwire_workers.training.time_left import TimeLeft
from gradwire_workers.training.trainable import differentiable_parameters, set_trained, trained_parameters

_REASONS = (
    None,
    "an output does not have one entry for each row of the batch",
    "the outputs of a row depend on other rows",
    "the gradients of a batch are not the sum of its rows' gradients",
    "what training changes in the buffers depends on how the batch is split",
    "an output that is no tensor depends on how the batch is split",
    "the batches that the program takes are too small to be split",
    "the program refuses some batches that are made of the example's rows",
)
_NOT_TAKEN = frozenset({"ASSERTION_FAILED", "PROGRAM_FAILED", "INDEX_OUT_OF_RANGE", "TARGET_OUT_OF_RANGE"})
_SHAPE, _OUTPUTS, _GRADIENTS, _BUFFERS, _OTHER_OUTPUTS, _TOO_SMALL, _REFUSED = 1, 2, 3, 4, 5, 6, 7


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
        return _REASONS[_TOO_SMALL]
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
            if found.item() == _REFUSED and change is not repeated:
                if change is random_like:
                    changes.append(shuffled)
                found.zero_()
            if found.item():
                break
        else:
            time_left.check()
            found[0] = _where_rows_reach(replica, variant, inputs, changes[-1])
            groups.all_reduce(found, largest=True)
    return _REASONS[int(found.item())]


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


@dataclass(frozen=True, kw_only=True)
class _Result:
    """outputs: those that are tensors; others: those that are not. gradients: of the trainable parameters, and of the
    inputs' leaves."""

    outputs: list[Tensor]
    others: list[Any]
    parameters: list[Tensor | None]
    inputs: dict[int, Tensor | None]
    buffers: list[Tensor]


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
        return _weights_of_rows(index, output) * scale

    try:
        expected = _run(replica, whole, weights)
    except Exception as error:
        if not _refuses(error):
            raise
        return _REFUSED  # all ranks see that, too
    if any(output.dim() == 0 or output.shape[0] != rows for output in expected.outputs):
        return _SHAPE  # all ranks see that, so none goes on to the collectives
    counts = 1.0 if part.count else 0.0

    def have_rows(outputs: list[Tensor]) -> bool:
        # The whole's may have had as many entries by chance. All ranks agree before a backward has them wait.
        misfits = any(output.dim() == 0 or output.shape[0] != mine.stop - mine.start for output in outputs)
        return not groups.all_reduce(torch.tensor([misfits], dtype=torch.uint8), largest=True).item()

    try:
        found = _run(replica, part, lambda index, _: weights(index, expected.outputs[index])[mine] * counts, have_rows)
    except _RowsMissingError:
        return _SHAPE

    trainable = _trainable(replica)
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
        return _OUTPUTS
    if part.count and not all(map(_same, found.others, expected.others)):
        return _OTHER_OUTPUTS
    # What counts nothing must have no gradient: a rank without rows computes one row that does not count.
    if not are_close(pairs, computed_in) or (scale == 0 and any(_is_nonzero(reference) for _, reference in pairs)):
        return _GRADIENTS
    if not are_close(list(zip(found.buffers, expected.buffers, strict=True)), computed_in):
        return _BUFFERS
    return 0


def _where_rows_reach(replica: Replica, variant: Variant, inputs: Sequence[Any], change: Change) -> int:
    """Index of the reason for which the first or the last of some rows reaches others, as far as this rank looks.

    0 where it sees neither. The rows are shared out among the ranks, which do not wait for each other here.
    """
    groups = replica.groups
    assert groups is not None
    symbol = next(symbol for symbol in variant.symbols if symbol.name == ROWS)
    sizes = {size for leaf in inputs if isinstance(leaf, Tensor) for size in leaf.shape[1:]}
    sizes |= {size for tensor in replica.program.all_state().values() for size in tensor.shape}
    rows = rows_to_mark(max(symbol.min, 2), symbol.max, sizes)
    if rows is None:
        return 0
    if groups.rank >= 2:
        return 0
    leaves = changed(change, variant, inputs, rows)
    shard = Shard(variant=variant.name, rows=rows, start=0, stop=rows, whole=True, inputs=tuple(leaves), targets=())
    with replica.row_by_row():
        try:
            clean = _run(replica, shard, _weights_of_rows)
        except Exception as error:
            if not _refuses(error):
                raise
            return 0
        for row in (0, rows - 1)[groups.rank :: groups.size]:
            try:
                if reason := _where_row_reaches(replica, shard, variant, MarkedRow(row=row, rows=rows), clean):
                    return reason
            except (RuntimeError, IndexError, GradwireError):
                # Some operators refuse what is not a number. What numbers have shown has to do.
                return 0
    return 0


def _where_row_reaches(replica: Replica, shard: Shard, variant: Variant, marked: MarkedRow, clean: _Result) -> int:
    with_rows = [has_rows(spec) for spec in variant.input_leaves]
    inputs = [marked.put(leaf) if has else _copied(leaf) for leaf, has in zip(shard.inputs, with_rows, strict=True)]
    whole_numbers = [leaf for leaf, has in zip(inputs, with_rows, strict=True) if has and not has_rounding(leaf)]
    before = Snapshot(replica.program.mutated_buffers(shard.variant))
    try:
        marked_shard = replace(shard, inputs=tuple(inputs))
        outputs, spread = marked.follow(lambda: replica.row_outputs(replica.outputs(marked_shard)), whole_numbers)
    finally:
        before.restore()
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    pairs = zip(tensors, clean.outputs, strict=True)
    if any(spread) or any(marked.has_spread(*pair) for pair in pairs if has_rounding(pair[0])):
        return _OUTPUTS
    back = _run(replica, shard, lambda index, output: marked.put(_weights_of_rows(index, output)))
    for index, gradient in back.inputs.items():
        reference = clean.inputs[index]
        if gradient is None or reference is None or not with_rows[index]:
            continue
        if marked.has_spread(gradient, reference):
            return _GRADIENTS
    return 0


def _refuses(error: Exception) -> bool:
    """Whether an error says that a program does not take these numbers, as one that takes shares between 0 and 1."""
    failure = as_program_failure(error)
    return isinstance(failure, InvalidArgument) and failure.reason in _NOT_TAKEN


class _RowsMissingError(Exception):
    """An output does not have one entry for each row."""


def _run(
    replica: Replica,
    shard: Shard,
    cotangent: Callable[[int, Tensor], Tensor],
    have_rows: Callable[[list[Tensor]], bool] | None = None,
) -> _Result:
    """One pass; buffers are as before after it. Raises _RowsMissingError where `have_rows(outputs)` is not true."""
    leaves = {index: leaf.detach().requires_grad_() for index, leaf in enumerate(shard.inputs) if has_rounding(leaf)}
    # Copies, because a graph may change its inputs in place.
    inputs = [leaves[i].clone() if i in leaves else _copied(leaf) for i, leaf in enumerate(shard.inputs)]
    mutated = replica.program.mutated_buffers(shard.variant)
    before = Snapshot(mutated)
    outputs = replica.row_outputs(replica.outputs(replace(shard, inputs=tuple(inputs))))
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    if have_rows is not None and not have_rows(tensors):
        before.restore()
        raise _RowsMissingError
    buffers = [buffer.detach().clone() for buffer in mutated]
    trainable = _trainable(replica)
    heads = [(index, output) for index, output in enumerate(tensors) if output.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * (len(trainable) + len(leaves))
    if heads and gradients:
        gradients = torch.autograd.grad(
            [output for _, output in heads],
            [*trainable, *leaves.values()],
            [cotangent(index, output) for index, output in heads],
            allow_unused=True,
        )
    outputs_now = [tensor.detach().clone() for tensor in tensors]
    before.restore()
    return _Result(
        outputs=outputs_now,
        others=[output for output in outputs if not isinstance(output, Tensor)],
        parameters=list(gradients[: len(trainable)]),
        inputs=dict(zip(leaves, gradients[len(trainable) :], strict=True)),
        buffers=buffers,
    )


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)


def _trainable(replica: Replica) -> list[Tensor]:
    return [parameter for parameter in replica.program.parameters_by_name().values() if parameter.requires_grad]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _weights_of_rows(index: int, output: Tensor) -> Tensor:
    """What each number counts in the value that is differentiated: random, so that no sum over rows hides anything."""
    generator = torch.Generator().manual_seed(index)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return weights.to(output.device, output.dtype)
