"""Which weights make a batch's loss and gradients of those of its shards: found by trying, and used only if they do.

In double precision, where a small term that is no mean (a balance of experts, a norm of the parameters beside a sum)
cannot hide in the rounding; on many batches, whose rows have more and less that counts; and a weight is taken only if
no other one would do as well on them, for then they would show nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import GradwireError, InternalError
from gradwire_proto.values import Variant
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs import BuiltProgram
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows, least_rows, row_range
from gradwire_workers.training.closeness import are_close, has_rounding
from gradwire_workers.training.gradients import add_up
from gradwire_workers.training.index_check import indices_checked
from gradwire_workers.training.loss_weights import LossWeight, numbers_compared, numbers_in, own_weight, share_of
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_examples import rows_to_try
from gradwire_workers.training.snapshots import Snapshot
from gradwire_workers.training.time_left import TimeLeft
from gradwire_workers.training.trial_leaves import TrialBatch, TrialBatches
from gradwire_workers.training.trial_sizes import at_other_sizes
from gradwire_workers.training.widening import widen

_MOST_NEIGHBOURS = 6
"""The numbers whose neighbours are tried too, at most."""


def find_weight(
    wide: Replica,
    variant: Variant,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    weights: Sequence[LossWeight],
    *,
    rows: int,
    more: int,
    time_left: TimeLeft,
) -> int | None:
    """The index of the weight that holds for the variant's loss; None where none does, or nothing tells.

    wide: the replica in double precision. inputs, targets: an example's leaves. rows, more: how many to try.
    Every rank calls it and gets the same answer, or OutOfTimeError.
    """
    assert wide.groups is not None
    check = _WeightCheck(wide, wide.groups, variant, weights)
    numbers = _with_neighbours(wide.graphs, variant)
    _try_all(check, wide, variant, inputs, targets, numbers, rows=rows, more=more, time_left=time_left)
    if not check.left:
        return None
    found = check.answer()
    if found is None or _holds_at_other_sizes(wide, variant, inputs, targets, weights[found], time_left):
        return found
    return None


def _holds_at_other_sizes(
    wide: Replica,
    variant: Variant,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    weight: LossWeight,
    time_left: TimeLeft,
) -> bool:
    """False where rows of other sizes than the example's show the weight to be wrong."""
    assert wide.groups is not None
    others = at_other_sizes(variant, inputs, targets, numbers_in(wide.graphs, variant))
    if others is None:
        return True
    rows = rows_to_try(variant, max(least_rows(variant), 2) * wide.groups.size + 1)
    check = _WeightCheck(wide, wide.groups, variant, [weight])
    numbers = numbers_compared(wide.graphs, variant)
    _try_all(check, wide, variant, *others, numbers, rows=rows, more=rows, time_left=time_left)
    return bool(check.left)


def _try_all(
    check: _WeightCheck,
    wide: Replica,
    variant: Variant,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    numbers: Sequence[int],
    *,
    rows: int,
    more: int,
    time_left: TimeLeft,
) -> None:
    """Try the weights on batches like these leaves, until none is left."""
    assert wide.groups is not None
    batches = TrialBatches(
        inputs=[widen(each) for each in inputs],
        targets=[widen(each) for each in targets],
        input_leaves=variant.input_leaves,
        target_leaves=variant.target_leaves,
        ranks=wide.groups.size,
        numbers=numbers,
    )
    with wide.program.without_randomness():
        for batch in batches.of_rows(rows, more=more, is_told=lambda: check.is_told):
            time_left.check()
            check.try_on(batch)
            if not check.left:
                return


def _with_neighbours(program: BuiltProgram, variant: Variant) -> tuple[int, ...]:
    """The numbers that may mean something, and on either side of those that the graph names."""
    named = numbers_in(program, variant)[:_MOST_NEIGHBOURS]
    around = [number + step for number in named for step in (-1, 1)]
    return tuple(dict.fromkeys((*numbers_compared(program, variant), *around, -1)))


@dataclass(frozen=True, kw_only=True)
class _Result:
    loss: Tensor
    gradients: list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """inputs: the leaves, to be differentiated by."""

    inputs: list[Any]
    outputs: list[Any]


class _WeightCheck:
    """left: the indices of the weights that no batch has shown to be wrong."""

    def __init__(
        self, replica: Replica, groups: ProcessGroups, variant: Variant, weights: Sequence[LossWeight]
    ) -> None:
        self.left = list(range(len(weights)))
        self._replica, self._groups, self._variant, self._weights = replica, groups, variant, weights
        self._trainable = [each for each in replica.program.parameters() if each.requires_grad]
        self._shares: list[list[tuple[float, ...]]] = []

    def answer(self) -> int | None:
        """The weight that is left, if batches have told it from the others that are."""
        return self.left[0] if self.is_told else None

    @property
    def is_told(self) -> bool:
        """Whether all that are left weigh alike, in everything that was tried."""
        first = self.left[0]
        alike = all(shares[other] == shares[first] for shares in self._shares for other in self.left)
        return bool(self._shares) and alike

    def try_on(self, batch: TrialBatch) -> None:
        """Drop the weights that give another loss, or other gradients, than the whole batch."""
        inputs, targets = tuple(batch.inputs), tuple(batch.targets)
        whole = Shard(
            variant=self._variant.name,
            rows=batch.rows,
            start=0,
            stop=batch.rows,
            whole=True,
            inputs=inputs,
            targets=targets,
        )
        expected = self._whole(whole)
        if expected is None:
            return
        start, stop = row_range(batch.rows, self._groups.size, self._groups.rank)
        mine = slice(start, stop)
        cut = [
            [leaf[mine] if has_rows(spec) else leaf for leaf, spec in zip(leaves, specs, strict=True)] if leaves else ()
            for leaves, specs in ((inputs, self._variant.input_leaves), (targets, self._variant.target_leaves))
        ]
        part = replace(whole, start=start, stop=stop, whole=False, inputs=tuple(cut[0]), targets=tuple(cut[1]))
        shares = self._all_shares(part)
        if expected.loss.isfinite():
            self._shares.append(shares)
        tried: dict[tuple[float, ...], bool] = {}
        moves = bool(self._replica.program.mutated_buffers(part.variant))
        run = None
        for index in self.left:
            # Those that weigh alike give the same.
            if shares[index] in tried:
                continue
            # A rank that weighs nothing lets no gradient through what it has computed, from then on.
            if moves or 0.0 in shares[index]:
                with self._unchanged(part):
                    found = self._holds(self._weights[index], part, self._forward(part), expected, mine)
            else:
                run = run or self._forward(part)
                found = self._holds(self._weights[index], part, run, expected, mine)
            tried[shares[index]] = found
        self.left = [index for index in self.left if tried[shares[index]]]

    def _all_shares(self, part: Shard) -> list[tuple[float, ...]]:
        """For each weight, the shares of all ranks, so rounded that equal ones are the same."""
        own = torch.tensor([own_weight(weight, part) for weight in self._weights], dtype=torch.float64)
        everyone = self._groups.all_gather(own)
        ranges = [row_range(part.rows, self._groups.size, rank) for rank in range(self._groups.size)]
        return [
            tuple(
                round(share_of(weight, each, column, stop - start, part.rows), 9)
                for each, (start, stop) in zip(column, ranges, strict=True)
            )
            for weight, column in zip(self._weights, everyone.T.tolist(), strict=True)
        ]

    def _whole(self, shard: Shard) -> _Result | None:
        """None where the program refuses the batch: torch would too, so that it shows nothing."""
        failed = torch.zeros(1, dtype=torch.uint8)
        result = None
        try:
            result = self._run(shard)
        except (RuntimeError, IndexError, ValueError, GradwireError) as error:
            if isinstance(error, InternalError):
                raise
            failed[0] = 1
        self._groups.all_reduce(failed, largest=True)
        return None if failed.item() else result

    def _holds(self, weight: LossWeight, part: Shard, run: _Forward, expected: _Result, mine: slice) -> bool:
        self._replica.weigh(part.variant, weight)
        own = self._replica.loss(part, run.outputs)
        self._replica.weigh(part.variant, None)
        loss = self._groups.all_reduce(own.value.to(torch.float64, copy=True))
        wrong = torch.zeros(1, dtype=torch.uint8)
        if not expected.loss.isfinite():
            wrong[0] = bool(loss.isfinite())  # what becomes of its gradients nobody needs to know
            self._groups.all_reduce(wrong, largest=True)
            return not wrong.item()
        pairs: list[tuple[Tensor | None, Tensor | None]] = [(loss, expected.loss.to(torch.float64))]
        wrong[0] = not are_close(pairs)
        if self._groups.all_reduce(wrong, largest=True).item():
            return False  # a backward would tell nothing more
        gradients = self._gradients(run, own.differentiable)
        pairs = []
        count, inputs = len(self._trainable), _differentiable(part.inputs)
        specs = [self._variant.input_leaves[index] for index in inputs]
        shared = [place for place, spec in enumerate(specs) if not has_rows(spec)]
        everyones = [*gradients[:count], *(gradients[count + place] for place in shared)]
        like = [*self._trainable, *(part.inputs[inputs[place]] for place in shared)]
        references = [*expected.gradients[:count], *(expected.gradients[count + place] for place in shared)]
        pairs += zip(add_up(everyones, like, self._groups), references, strict=True)
        for place, spec in enumerate(specs):
            reference = expected.gradients[count + place]
            if has_rows(spec) and inputs[place] not in weight.reads and part.count:
                pairs.append((gradients[count + place], None if reference is None else reference[mine]))
        wrong[0] = not are_close(pairs)
        self._groups.all_reduce(wrong, largest=True)
        return not wrong.item()

    def _run(self, shard: Shard) -> _Result:
        """Loss and gradients, of the parameters and of the inputs, as a command would have them."""
        with self._unchanged(shard):
            # The forward alone: a backward looks up what the forward did.
            with indices_checked():
                run = self._forward(shard)
                loss = self._replica.loss(shard, run.outputs)
            return _Result(loss=loss.value, gradients=self._gradients(run, loss.differentiable))

    def _forward(self, shard: Shard) -> _Forward:
        inputs = [leaf.detach().requires_grad_() if has_rounding(leaf) else leaf for leaf in shard.inputs]
        given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        return _Forward(inputs=inputs, outputs=self._replica.outputs(replace(shard, inputs=tuple(given))))

    def _gradients(self, run: _Forward, loss: Tensor) -> list[Tensor | None]:
        wanted = [*self._trainable, *(run.inputs[index] for index in _differentiable(run.inputs))]
        if not loss.requires_grad or not wanted:
            return [None] * len(wanted)
        return list(torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True))

    @contextmanager
    def _unchanged(self, shard: Shard) -> Iterator[None]:
        """After, what running the shard's variant changes is as before."""
        before = Snapshot(self._replica.program.mutated_buffers(shard.variant))
        try:
            yield
        finally:
            before.restore()


def _differentiable(leaves: Sequence[Any]) -> list[int]:
    return [index for index, leaf in enumerate(leaves) if has_rounding(leaf)]
