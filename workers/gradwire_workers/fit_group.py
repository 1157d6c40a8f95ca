"""Fits on the ranks of one model: steps and evaluations on batches of a dataset, each split as one of its own is."""

from __future__ import annotations

from typing import Any

from gradwire_proto.batch_check import flatten
from gradwire_proto.errors import RankLost
from gradwire_proto.values import (
    Batch,
    BatchLosses,
    FitSteps,
    StepsResult,
    TensorData,
    Value,
    leaves,
    map_leaves,
)
from gradwire_workers.combining import timing_of
from gradwire_workers.group_kernels import GroupKernels
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.rank_channel import decode_error
from gradwire_workers.ranks import Answers, Ranks
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows, rows_of, split


class FitGroup:
    """See the module."""

    def __init__(self, ranks: Ranks, variants: GroupVariants, kernels: GroupKernels) -> None:
        self._ranks = ranks
        self._variants = variants
        self._kernels = kernels

    async def run(self, dataset: Batch, steps: FitSteps, *, most: int | None = None, command: int) -> StepsResult:
        """Apply these steps, numbered from `command` on, as far as they go: `error` of the result says what ended them.

        most: how many of them; None: all. What refuses the first of them is raised, and nothing was applied.
        """
        examples = examples_of(dataset)
        count = steps.steps if most is None else min(most, steps.steps)
        per_epoch = -(-examples // steps.batch_size)
        epoch, first = divmod(steps.first_step, per_epoch)
        sizes = _sizes(first, count, per_epoch, steps.batch_size, examples)
        kinds = [await self._kind(dataset, rows, training=True) for rows in sizes]
        fields = [
            {
                "kinds": [of_rank[rank] for of_rank in kinds],
                "examples": examples,
                "batch_size": steps.batch_size,
                "first": first,
                "steps": count,
                "seed": None if steps.seed is None else steps.seed + epoch,
                "rows": steps.rows or None,
                "command": command,
            }
            for rank in range(len(self._ranks))
        ]
        with self._variants.carried_out():
            answers = await self._ranks.call("fit", fields)
            result = await self._result(answers)
        if self._kernels.wanted:
            for rows, kind in zip(sizes, kinds, strict=True):
                came = len(result.losses) if rows == min(steps.batch_size, examples) else 1
                self._kernels.came(kind[0]["shard"]["variant"], between(dataset, 0, rows), came)
        return result

    async def forget(self) -> None:
        """Let go of the dataset that was used last: mapped, its file takes room even when it is removed."""
        await self._ranks.call("forget_dataset", [{}] * len(self._ranks), changes=False)

    async def evaluate(self, dataset: Batch, batch_size: int, *, first: int, most: int) -> BatchLosses:
        """The losses of its batches of so many rows, `most` of them from the `first`-th on, in evaluation mode.

        Changes nothing. An error names the batch that it is about.
        """
        examples = examples_of(dataset)
        full, rest = divmod(examples, batch_size)
        losses, seconds, position, end = [], 0.0, first, min(first + most, full + (rest > 0))
        while position < end:
            rows, stop = (batch_size, min(end, full)) if position < full else (rest, end)
            of_rank = await self._kind(dataset, rows, training=False)
            fields = {"examples": examples, "batch_size": batch_size, "first": position, "batches": stop - position}
            with self._variants.carried_out():
                answers = await self._ranks.call(
                    "evaluate", [{**fields, "kinds": [kind]} for kind in of_rank], changes=False
                )
            timing = timing_of(answers)
            losses += answers.fields[0]["losses"]
            seconds += timing.compute + timing.all_reduce
            position = stop
        return BatchLosses(losses=tuple(losses), seconds=seconds)

    async def _kind(self, dataset: Batch, rows: int, *, training: bool) -> list[dict[str, Any]]:
        """How batches of so many rows are computed, on each rank."""
        batch = between(dataset, 0, rows)
        variant, size, whole = await self._variants.choose_rows(batch, training=training)
        shards = split(variant, size, batch, ranks=len(self._ranks), whole=whole)
        inputs = tuple(flatten(variant.input_structure, dataset.inputs, "dataset.inputs"))
        targets = ()
        if dataset.targets is not None:
            targets = tuple(flatten(variant.target_structure, dataset.targets, "dataset.targets"))
        return [
            {
                "shard": _fields(shard, *(((), ()) if shard.idle else (inputs, targets))),
                "split_inputs": [has_rows(each) for each in variant.input_leaves if not shard.idle],
                "split_targets": [has_rows(each) for each in variant.target_leaves if targets and not shard.idle],
            }
            for shard in shards
        ]

    async def _result(self, answers: Answers) -> StepsResult:
        first = answers.fields[0]
        errors = [decode_error(each["error"]) for each in answers.fields if each["error"] is not None]
        cause = next((error for error in errors if error.reason != "PEER_FAILED"), None)
        if len({len(each["losses"]) for each in answers.fields}) > 1 or (errors and cause is None):
            raise self._ranks.give_up(RankLost("the ranks lost each other during a fit", outcome="unknown"))
        if any(each["needs_rejoin"] for each in answers.fields):
            await self._ranks.rejoin()
        return StepsResult(losses=tuple(first["losses"]), step=first["step"], timing=timing_of(answers), error=cause)


def examples_of(dataset: Batch) -> int:
    """Rows of every tensor."""
    tensors = (leaf for part in (dataset.inputs, dataset.targets) for _, leaf in leaves(part))
    return next(leaf.shape[0] for leaf in tensors if isinstance(leaf, TensorData))


def between(dataset: Batch, start: int, stop: int) -> Batch:
    """A batch of the examples [start, stop), not copied."""

    def cut(value: Value) -> Value:
        return map_leaves(lambda leaf: rows_of(leaf, start, stop) if isinstance(leaf, TensorData) else leaf, value)

    return Batch(cut(dataset.inputs), cut(dataset.targets))


def _sizes(first: int, count: int, per_epoch: int, batch_size: int, examples: int) -> list[int]:
    """The sizes of the batches of so many steps, the first of which is `first` in its epoch."""
    last = examples - (per_epoch - 1) * batch_size
    has_last = first + count >= per_epoch
    has_others = (count > 1 and per_epoch > 1) or first + 1 < per_epoch
    return list(dict.fromkeys([*([batch_size] if has_others else []), *([last] if has_last else [])]))


def _fields(shard: Shard, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "variant": shard.variant,
        "rows": shard.rows,
        "start": shard.start,
        "stop": shard.stop,
        "whole": shard.whole,
        "idle": shard.idle,
        "inputs": inputs,
        "targets": targets,
    }
