"""The ranks of one model, called as one: a batch is split over them, and their answers become one result.

One command at a time. A command that fails has changed nothing on any rank, and the group goes on; where that cannot
be had (a rank died, or failed in the middle of its update), the group is lost and says so to every later call.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from gradwire_proto.batch_check import check_batch, flatten, select_variant
from gradwire_proto.codec import encode_optimizer, encode_variant
from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument, RankLost
from gradwire_proto.values import (
    Batch,
    ForwardResult,
    GradientQuery,
    GradientResult,
    ModelUpdate,
    NamedTensors,
    Sharding,
    StateTensor,
    StepResult,
    TensorData,
    TensorSpec,
    Value,
    Variant,
    leaves,
)
from gradwire_workers.after_applied import errors_after_applied
from gradwire_workers.combining import forward_result, gradient_result, step_result
from gradwire_workers.open_variants import OpenVariants
from gradwire_workers.ranks import Answers, Ranks
from gradwire_workers.retained_group import RetainedGroup
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import least_rows, split

logger = logging.getLogger(__name__)

_ONE_RANK = Sharding("rows", "one rank computes every batch")
_ROWS = Sharding("rows", "rows are independent: each rank computes its share of a batch")


class WorkerGroup:
    """See the module. Made by `Cluster.start_group`; calls must not overlap, and must not be cancelled halfway.

    A call that is cancelled while it runs loses the group: nobody knows what its ranks did.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        variants: Sequence[Variant],
        device: str,
        writer: SegmentWriter,
        require_sharding: bool,
        release: Callable[[bool], Awaitable[None]],
    ) -> None:
        self.device = device
        self.sharding = _ONE_RANK if len(ranks) == 1 else _ROWS
        self.tensors: tuple[StateTensor, ...] = ()
        """An architecture's, as the ranks have built it."""
        self.opening: OpenVariants | None = None
        """Makes variants for the batches of an architecture; None where the client brings them."""
        self._ranks = ranks
        self._variants = list(variants)
        self._whole: dict[str, bool] = {}
        self._writer = writer
        self._require_sharding = require_sharding
        self._release = release
        self._closed = False
        self.retained = RetainedGroup(ranks, writer, self._choose_forward, shard_fields)
        """Its forwards that are retained, and the gradients that its ranks hold."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those that there are now."""
        return tuple(self._variants)

    @property
    def workers(self) -> int:
        return len(self._ranks)

    @property
    def rank_lost(self) -> RankLost | None:
        """Why this group is lost: every later call raises it. None while it lives."""
        return self._ranks.lost

    @property
    def on_lost(self) -> Callable[[RankLost], None] | None:
        """Called once, on the event loop, when the group is lost; also while it is idle."""
        return self._ranks.on_lost

    @on_lost.setter
    def on_lost(self, callback: Callable[[RankLost], None] | None) -> None:
        self._ranks.on_lost = callback

    async def close(self, *, reuse: bool = True) -> None:
        """Gives ranks and capacity back; a second call does nothing. Without `reuse` the ranks' processes end.

        So they do when the group is lost: a process that failed never serves another model.
        """
        if not self._closed:
            self._closed = True
            self._ranks.on_lost = None
            await self._release(reuse and self._ranks.lost is None)

    async def prepare(self, example: Batch | None) -> None:
        """Finds out how batches can be spread over the ranks.

        InvalidArgument without an example (EXAMPLE_NEEDED), or where it does not fit; FailedPrecondition
        (ROWS_NOT_INDEPENDENT) where sharding is required and impossible.
        """
        if self.opening is not None:
            if example is not None:
                for training in (True, False):
                    self._variants.append(await self.opening.open(example, self._variants, training=training))
            elif self.workers == 1:
                # Variants are made of the batches that come.
                return
            else:
                raise self._example_needed()
        inputs = [self._example_inputs(variant, example) for variant in self._variants]
        decisive = next((variant for variant in self._variants if variant.training), self._variants[0])
        for variant, inputs_of in zip(self._variants, inputs, strict=True):
            # An architecture's rows are guessed from sizes, which may be the same by chance: whole is always right.
            check = self._why_whole if self.opening is None else self._why_whole_or_failed
            reason = await check(variant, inputs_of)
            self._whole[variant.name] = reason is not None
            if reason is None or variant is not decisive:
                continue
            if self._require_sharding:
                raise FailedPrecondition(
                    f"batches cannot be split over {self.workers} ranks: {reason}",
                    reason="ROWS_NOT_INDEPENDENT",
                    field="model.require_sharding",
                )
            self.sharding = Sharding("whole", reason)

    def _example_inputs(self, variant: Variant, example: Batch | None) -> tuple[Any, ...] | None:
        """The leaves with which to check the variant's rows; None where there is nothing to check."""
        if not _has_rows(variant):
            return None
        if example is not None:
            check_batch(variant, example, targets=False, field="example")
            return tuple(flatten(variant.input_structure, example.inputs, "example.inputs"))
        if self.workers == 1:
            return None
        raise self._example_needed()

    def _example_needed(self) -> InvalidArgument:
        return InvalidArgument(
            f"{self.workers} ranks need an example to find out whether rows are independent",
            field="example",
            reason="EXAMPLE_NEEDED",
        )

    async def _why_whole(self, variant: Variant, inputs: tuple[Any, ...] | None) -> str | None:
        """Why the variant's batches must not be split, in words; None where they may."""
        if self.workers == 1:
            return None
        if inputs is None:
            return None if _has_rows(variant) else "the program was exported for one batch size"
        fields = {"variant": variant.name, "inputs": inputs}
        answers = await self._ranks.call("check_rows", [fields] * self.workers, changes=False)
        return answers.fields[0]["reason"]

    async def train_step(self, batch: Batch, *, command: int, lr: float | None = None) -> StepResult:
        """Forward, backward, all-reduce and update. `command` numbers it and seeds its random operators."""
        shards, rows = await self._split(batch, training=True)
        answers = await self._call_shards("train_step", shards, {"command": command, "lr": lr})
        return step_result(answers, rows)

    async def forward_backward(self, batch: Batch, *, command: int) -> StepResult:
        """Adds the batch's gradients to those that the ranks hold."""
        shards, rows = await self._split(batch, training=True)
        return step_result(await self._call_shards("forward_backward", shards, {"command": command}), rows)

    async def optimizer_step(
        self, gradients: NamedTensors | None, *, lr: float | None = None, groups: Sequence[Mapping[str, Value]] = ()
    ) -> StepResult:
        """Applies these gradients, or the held ones. groups: options that the parameter groups take first, and keep."""
        fields = {"gradients": gradients, "lr": lr, "groups": [dict(options) for options in groups]}
        return step_result(await self._ranks.call("optimizer_step", [fields] * self.workers), 0)

    async def zero_grad(self) -> None:
        """Drops the held gradients."""
        await self._ranks.call("zero_grad", [{}] * self.workers)

    async def compute_gradients(
        self, batch: Batch, query: GradientQuery, vectors: NamedTensors | None = None, *, command: int = 0
    ) -> GradientResult:
        """Loss, gradients and outputs. Changes nothing. The receiver owns the segments that the result names.

        vectors: gives the Hessian times these in place of gradients. FailedPrecondition (ROWS_NOT_OPEN) where each
        example's own gradients are asked for, and the program has no graph for one example.
        """
        variant, shards, rows = await self._choose(batch, training=query.training, targets=True)
        if query.per_example and not (_has_rows(variant) and least_rows(variant) <= 1):
            raise FailedPrecondition(
                "the program was exported for batches of several examples, and has no graph for one alone",
                reason="ROWS_NOT_OPEN",
                field="per_example",
            )
        extra = {"query": asdict(query), "command": command, "vectors": dict(vectors or {})}
        answers = await self._call_shards("compute_gradients", shards, extra, changes=False)
        return await gradient_result(answers, variant, shards, rows, self._writer, per_example=query.per_example)

    async def forward(self, inputs: Value, *, training: bool, seed: int | None, command: int) -> ForwardResult:
        """The outputs for the inputs. In training mode buffers move."""
        variant, shards, _ = await self._choose(Batch(inputs), training=training, targets=False)
        extra = {"training": training, "seed": seed, "command": command}
        answers = await self._call_shards("forward", shards, extra, changes=training)
        with errors_after_applied() if training else nullcontext():
            return await forward_result(answers, variant, shards, self._writer)

    async def state_dict(self, names: Sequence[str] | None) -> tuple[NamedTensors, int]:
        """(parameters and buffers by name, updates applied). `names`: names or globs, None for all."""
        fields = {"names": None if names is None else list(names)}
        answers = await self._ranks.call("state_dict", [fields], changes=False)
        return answers.fields[0]["tensors"], answers.fields[0]["step"]

    async def load_state_dict(self, tensors: NamedTensors, *, partial: bool) -> int:
        """Replaces parameters and buffers on every rank. Returns the updates applied so far."""
        fields = {"tensors": tensors, "partial": partial}
        answers = await self._ranks.call("load_state_dict", [fields] * self.workers)
        return answers.fields[0]["step"]

    async def optimizer_state(self) -> tuple[Value, int]:
        """(state of the optimizer and its schedule, updates applied). Every rank has the same."""
        answers = await self._ranks.call("optimizer_state", [{}], changes=False)
        return answers.fields[0]["state"], answers.fields[0]["step"]

    async def load_optimizer_state(self, state: Value) -> int:
        """Replaces the state of the optimizer and its schedule on every rank. Returns the updates applied so far."""
        answers = await self._ranks.call("load_optimizer_state", [{"state": state}] * self.workers)
        return answers.fields[0]["step"]

    async def update(self, update: ModelUpdate) -> tuple[str, ...]:
        """Changes settings on every rank. Returns the names of the parameters that are trained from here on."""
        optimizer = None if update.optimizer is None else encode_optimizer(update.optimizer).SerializeToString()
        fields = {"trainable": list(update.trainable), "optimizer": optimizer, "lr": update.lr}
        answers = await self._ranks.call("update", [fields] * self.workers)
        return tuple(answers.fields[0]["trained"])

    async def add_variant(
        self,
        variant: Variant,
        *,
        tensors: Sequence[StateTensor] = (),
        values: Mapping[str, Any] | None = None,
        operators: Mapping[str, str] | None = None,
        example: Batch | None = None,
    ) -> None:
        """Adds a graph, and finds out how its batches can be spread.

        `example` must fit it; it is needed where there are several ranks and the variant has rows. Should the program
        fail on it, the variant is there all the same, and its batches are not split.
        """
        inputs = self._example_inputs(variant, example)
        fields = {
            "variant": encode_variant(variant).SerializeToString(),
            "tensors": [asdict(tensor) for tensor in tensors],
            "values": dict(values or {}),
            "operators": dict(operators or {}),
        }
        await self._ranks.call("add_variant", [fields] * self.workers)
        await self._take_in(variant, inputs)

    async def _take_in(self, variant: Variant, inputs: tuple[Any, ...] | None) -> None:
        """Find out how the batches of a variant that the ranks have can be spread."""
        self._variants.append(variant)
        # Until it is known, and should the check fail: the variant is on the ranks, and whole is always right.
        self._whole[variant.name] = True
        reason = await self._why_whole_or_failed(variant, inputs)
        if reason is not None:
            logger.info("batches of the variant %s are not split: %s", variant.name, reason)
        self._whole[variant.name] = reason is not None

    async def _why_whole_or_failed(self, variant: Variant, inputs: tuple[Any, ...] | None) -> str | None:
        try:
            return await self._why_whole(variant, inputs)
        except GradwireError as error:
            if self.rank_lost is not None:
                raise
            return f"the example could not be computed: {error}"

    async def _split(self, batch: Batch, *, training: bool) -> tuple[list[Shard], int]:
        _, shards, rows = await self._choose(batch, training=training, targets=True)
        return shards, rows

    async def _choose(self, batch: Batch, *, training: bool, targets: bool) -> tuple[Variant, list[Shard], int]:
        variant, rows = await self._fitting(batch, training=training, targets=targets)
        rows = rows if _has_rows(variant) else examples_in(batch)
        whole = self._whole.get(variant.name, False)
        return variant, split(variant, rows, batch, ranks=self.workers, whole=whole), rows

    async def _fitting(self, batch: Batch, *, training: bool, targets: bool) -> tuple[Variant, int]:
        """(the variant that the batch fits, its rows); an architecture's is made if need be."""
        try:
            return select_variant(self._variants, batch, training=training, targets=targets)
        except GradwireError:
            if self.opening is None:
                raise
        variant = await self.opening.open(batch, self._variants, training=training)
        await self._take_in(variant, self._example_inputs(variant, batch))
        return variant, check_batch(variant, batch, targets=targets)

    async def _choose_forward(self, batch: Batch, training: bool) -> tuple[Variant, list[Shard]]:
        variant, shards, _ = await self._choose(batch, training=training, targets=False)
        return variant, shards

    async def _call_shards(
        self, kind: str, shards: Sequence[Shard], extra: Mapping[str, Any], *, changes: bool = True
    ) -> Answers:
        fields = [{"shard": shard_fields(shard), **extra} for shard in shards]
        return await self._ranks.call(kind, fields, changes=changes)


def _has_rows(variant: Variant) -> bool:
    return any(isinstance(leaf, TensorSpec) and leaf.has_rows for leaf in variant.input_leaves)


def examples_in(batch: Batch) -> int:
    """Dimension 0 of the first tensor, at least 1: what a batch of fixed size counts as."""
    shapes = (leaf.shape for _, leaf in leaves(batch.inputs) if isinstance(leaf, TensorData))
    # Never 0: a shard of no rows is a dummy, whose gradients do not count.
    return max(1, next((shape[0] for shape in shapes if shape), 1))


def shard_fields(shard: Shard) -> dict[str, Any]:
    """A shard as a message's plain values. Not asdict: it would copy the tensors."""
    return {name: getattr(shard, name) for name in Shard.__slots__}
