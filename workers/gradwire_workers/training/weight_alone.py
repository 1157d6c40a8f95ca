"""Whether the weight that a client gave holds for a loss, tried on one rank: what is refused there is refused on more.

The parts of a batch run one after another. Where that alone changes the outputs (batch norm, which ranks synchronise)
it tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import GradwireError, InternalError
from gradwire_proto.values import Variant
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows, least_rows, row_range, smallest_share
from gradwire_workers.training.closeness import are_close
from gradwire_workers.training.index_check import indices_checked
from gradwire_workers.training.loss_weights import LossWeight, numbers_compared, numbers_in, own_weight, share_of
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_examples import rows_to_try
from gradwire_workers.training.snapshots import Snapshot
from gradwire_workers.training.time_left import TimeLeft
from gradwire_workers.training.trial_leaves import TrialBatch, TrialBatches
from gradwire_workers.training.trial_sizes import at_other_sizes
from gradwire_workers.training.widening import widen

_PARTS = 2


def holds_alone(
    wide: Replica,
    variant: Variant,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    weight: LossWeight,
    time_left: TimeLeft,
) -> bool:
    """False where parts of some batch, weighed, give another loss or other gradients than the whole of it.

    wide: the replica in double precision. inputs, targets: an example's leaves. Raises OutOfTimeError.
    """
    rows = rows_to_try(variant, max(least_rows(variant), 2) * _PARTS + 1)
    # The backward of a function need not be linear: what its parts give tells nothing of the loss.
    if smallest_share(rows, _PARTS) < least_rows(variant) or wide.program.has_functions(variant.name):
        return True
    trial, more = _Trial(wide, variant, weight), rows_to_try(variant, rows + _PARTS)
    others = at_other_sizes(variant, inputs, targets, numbers_in(wide.graphs, variant))
    tried = [((inputs, targets), more, False)]
    if others is not None:
        tried.append((others, rows, True))
    with wide.program.without_randomness():
        for leaves, most, is_told in tried:
            for batch in _batches(wide, variant, *leaves).of_rows(rows, more=most, is_told=lambda told=is_told: told):
                time_left.check()
                if not trial.holds(batch):
                    return False
    return True


def _batches(wide: Replica, variant: Variant, inputs: Sequence[Any], targets: Sequence[Any]) -> TrialBatches:
    return TrialBatches(
        inputs=[widen(each) for each in inputs],
        targets=[widen(each) for each in targets],
        input_leaves=variant.input_leaves,
        target_leaves=variant.target_leaves,
        ranks=_PARTS,
        numbers=numbers_compared(wide.graphs, variant),
    )


@dataclass(frozen=True, kw_only=True)
class _Result:
    loss: Tensor
    outputs: list[Any]
    gradients: list[Tensor | None]


class _Trial:
    def __init__(self, wide: Replica, variant: Variant, weight: LossWeight) -> None:
        self._wide, self._variant, self._weight = wide, variant, weight
        self._trained = [each for each in wide.program.parameters() if each.requires_grad]

    def holds(self, batch: TrialBatch) -> bool:
        """Whether the weight holds for the batch, or the batch tells nothing."""
        try:
            with indices_checked():
                expected = self._run(self._cut(batch, slice(0, batch.rows)))
                ranges = [slice(*row_range(batch.rows, _PARTS, part)) for part in range(_PARTS)]
                parts = [self._cut(batch, each) for each in ranges]
                found = [self._run(each) for each in parts]
                own = [own_weight(self._weight, each) for each in parts]
        except (RuntimeError, IndexError, ValueError, GradwireError) as error:
            if isinstance(error, InternalError):
                raise
            return True  # torch would refuse it too
        if not all(map(self._are_rows_of, found, ranges, [expected] * _PARTS)):
            return True
        shares = [
            share_of(self._weight, each, own, part.count, batch.rows) for each, part in zip(own, parts, strict=True)
        ]
        counted = [(share, each) for share, each in zip(shares, found, strict=True) if share != 0]
        loss = sum((share * each.loss for share, each in counted), torch.zeros_like(expected.loss))
        if not expected.loss.isfinite():
            return not loss.isfinite()
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        for index, like in enumerate(self._trained):
            reference, total = expected.gradients[index], torch.zeros_like(like, requires_grad=False)
            for share, each in counted:
                gradient = each.gradients[index]
                total = total if gradient is None else total + share * gradient
            pairs.append((total, torch.zeros_like(total) if reference is None else reference))
        return are_close([(loss, expected.loss)]) and are_close(pairs)

    def _are_rows_of(self, found: _Result, rows: slice, whole: _Result) -> bool:
        pairs = list(zip(found.outputs, whole.outputs, strict=True))
        tensors = [(one, other) for one, other in pairs if isinstance(one, Tensor) and isinstance(other, Tensor)]
        if any(other.dim() == 0 for _, other in tensors):
            return False
        return are_close([(one, other[rows]) for one, other in tensors])

    def _cut(self, batch: TrialBatch, rows: slice) -> Shard:
        """Those rows, as a batch of their own."""
        inputs, targets = (
            tuple(leaf[rows] if has_rows(spec) else leaf for leaf, spec in zip(leaves, specs, strict=True))
            if leaves
            else ()
            for leaves, specs in (
                (batch.inputs, self._variant.input_leaves),
                (batch.targets, self._variant.target_leaves),
            )
        )
        count = rows.stop - rows.start
        return Shard(
            variant=self._variant.name, rows=count, start=0, stop=count, whole=True, inputs=inputs, targets=targets
        )

    def _run(self, shard: Shard) -> _Result:
        before = Snapshot(self._wide.program.mutated_buffers(shard.variant))
        try:
            outputs = self._wide.outputs(shard)
            loss = self._wide.loss(shard, outputs)
            gradients: Sequence[Tensor | None] = [None] * len(self._trained)
            if loss.differentiable.requires_grad and self._trained:
                gradients = torch.autograd.grad(loss.differentiable, self._trained, allow_unused=True)
        finally:
            before.restore()
        rows = [each.detach() if isinstance(each, Tensor) else each for each in self._wide.row_outputs(outputs)]
        return _Result(loss=loss.value, outputs=rows, gradients=list(gradients))
