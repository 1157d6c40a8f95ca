"""The ranks of one model, called as one: a batch is split over them, and their answers become one result.

One command at a time. A command that fails has changed nothing on any rank, and the group goes on; where that cannot
be had (a rank died, or failed in the middle of its update), the group is lost and says so to every later call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from gradwire_proto.batch_form import BatchForm, FormedStep
from gradwire_proto.codec import encode_optimizer, encode_variant
from gradwire_proto.errors import FailedPrecondition, RankLost
from gradwire_proto.values import (
    Batch,
    ForwardResult,
    GradientQuery,
    GradientResult,
    ModelState,
    ModelUpdate,
    NamedTensors,
    Sharding,
    SplitDecision,
    StateTensor,
    StepResult,
    Value,
    Variant,
)
from gradwire_workers.after_applied import errors_after_applied
from gradwire_workers.combining import forward_result, gradient_result, step_result
from gradwire_workers.fit_group import FitGroup
from gradwire_workers.group_kernels import GroupKernels
from gradwire_workers.group_state import model_state
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.packed_steps import Layout, Layouts
from gradwire_workers.pool.lease import Lease
from gradwire_workers.ranks import Answers, Ranks
from gradwire_workers.retained_group import RetainedGroup
from gradwire_workers.salvage import salvage
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.shard import Shard, shard_fields
from gradwire_workers.sharding import least_rows
from gradwire_workers.step_flow import StepFlow
from gradwire_workers.step_memory import StepMemory
from gradwire_workers.variant_splits import varies


class WorkerGroup:
    """See the module. Made by `Cluster.start_group`; calls must not overlap, and must not be cancelled halfway.

    threads: torch's in each rank. A call that is cancelled while it runs loses the group: nobody knows what its ranks
    did.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        variants: GroupVariants,
        device: str,
        writer: SegmentWriter,
        threads: int = 1,
        release: Callable[[bool], Awaitable[None]],
        compiles: bool = False,
    ) -> None:
        self.device = device
        self.tensors: tuple[StateTensor, ...] = ()
        """An architecture's, as the ranks have built it."""
        self.lease: Lease | None = None
        """What it holds of the cluster."""
        self._ranks = ranks
        self._variants = variants
        self._threads = threads
        self._writer = writer
        self._layouts = Layouts(self._layout)
        self._step_memory = StepMemory(writer.new_path)
        self._release = release
        self._closed = False
        self._releasing: asyncio.Future[None] | None = None
        self.retained = RetainedGroup(ranks, writer, variants)
        """Its forwards that are retained, and the gradients that its ranks hold."""
        self.kernels = GroupKernels(ranks, variants, wanted=compiles)
        """Its compiled kernels."""
        self.fitting = FitGroup(ranks, variants, self.kernels)
        """Its steps on datasets."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those that there are now, but for those that only reads use."""
        return self._variants.of_commands

    @property
    def splits(self) -> Mapping[str, SplitDecision]:
        """How the batches of its variants are spread: as commands have found it."""
        return self._variants.splits

    @property
    def sharding(self) -> Sharding:
        """How the batches that it trains on are spread."""
        return self._variants.sharding

    def expect(self, splits: Mapping[str, SplitDecision]) -> None:
        """Variants of these names that the next command brings are spread like this: nothing is tried again."""
        self._variants.expect(splits)

    @contextmanager
    def without_limits(self) -> Iterator[None]:
        """Inside, commands are carried out that were taken under other limits."""
        self._ranks.again = True
        try:
            yield
        finally:
            self._ranks.again = False

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

    @property
    def is_closed(self) -> bool:
        """Whether it holds nothing of the cluster any more."""
        return self._closed

    async def vacate(self) -> None:
        """Ends its ranks, which are lost, and keeps their place for others until `close`."""
        self._ranks.on_lost = None
        if self.lease is not None and not self._closed:
            await self.lease.vacate()

    async def close(self, *, reuse: bool = True) -> None:
        """Gives ranks and capacity back; a second call does nothing. Without `reuse` the ranks' processes end.

        So they do when the group is lost: a process that failed never serves another model.
        """
        if not self._closed:
            self._closed = True
            self._ranks.on_lost = None
            self._step_memory.close()
            # To its end, whoever is cancelled: nobody could begin it again.
            self._releasing = asyncio.ensure_future(self._release(reuse and self._ranks.lost is None))
            await asyncio.shield(self._releasing)

    async def prepare(self, example: Batch | None) -> None:
        """Finds out how batches can be spread over the ranks. See `GroupVariants.prepare`."""
        await self._variants.prepare(example)

    async def resume(self, state: ModelState) -> None:
        """Spreads batches as the group did whose state this is, and runs them on the same kernels.

        See `GroupVariants.resume` and `GroupKernels.resume`.
        """
        self._variants.resume(state)
        await self.kernels.resume(state.kernels)

    @property
    def applied(self) -> int:
        """Commands that have changed the model since the group was started; each rank has counted the same."""
        return self._ranks.applied

    @property
    def retains(self) -> bool:
        """Whether forwards are retained: they are no part of `state`."""
        return self.retained.any

    async def state(self) -> ModelState:
        """All that the model's future depends on, but for forwards that are retained. `command` is left 0.

        The caller owns the segments that it names. They outlive the ranks.
        """
        fields = [{"whole": rank == 0} for rank in range(self.workers)]
        answers = await self._ranks.call("state", fields, changes=False)
        return self._state_of(answers.fields[0], [each["held"] for each in answers.fields])

    async def salvage(self, applied: int) -> ModelState | None:
        """After RankLost: the state of a rank that is there and whole, after just so many commands. None: none is.

        Ends the ranks that are lost, so that the others notice. Takes 1.5 s, and as long as reading the state takes.
        Nothing but `close` may be called after it.
        """
        found = None if self.retains else await salvage(self._ranks, applied)
        return None if found is None else self._state_of(*found)

    def _state_of(self, whole: Mapping[str, Any], held: Sequence[Any]) -> ModelState:
        whole, held = self._writer.adopt((dict(whole), list(held)))
        return model_state(
            whole,
            held,
            decisions=self.splits,
            opened=self._variants.opened,
            threads=self._threads,
            kernels=self.kernels.in_use,
        )

    async def train_step(self, batch: Batch, *, command: int, lr: float | None = None) -> StepResult:
        """Forward, backward, all-reduce and update. `command` numbers it and seeds its random operators."""
        shards, rows = await self._split(batch, training=True)
        fields = {"command": command, "lr": lr}
        answers = await self._call_shards("train_step", shards, fields, any_will_do=True)
        self.kernels.came(shards[0].variant, batch)
        # Of all that ranks answer only this is not the same: a lost one need not be asked.
        return replace(step_result(answers, rows), rank_rows=tuple(shard.count for shard in shards))

    def together(self, steps: Sequence[FormedStep]) -> int:
        """How many of these steps, from the first, can go to the ranks together; 0: the first must go alone."""
        return len(self._layouts.of_first(steps, self._variants.count))

    def step_flow(self, took: Callable[[list[StepResult]], None]) -> StepFlow:
        """For `train_step` of steps that can go together: see StepFlow."""

        def came(layout: Layout, steps: int) -> None:
            self.kernels.came(layout.variant, layout.form.numbered, steps)

        known = came if self.kernels.wanted else None
        return StepFlow(
            self._ranks,
            lambda steps: self._layouts.of_first(steps, self._variants.count),
            took,
            known,
            self._step_memory,
        )

    def _layout(self, form: BatchForm) -> Layout | None:
        """How batches of this form are spread; None where only trying tells."""
        known = self._variants.choose_known(form.numbered)
        return None if known is None else Layout(form, *known)

    async def forward_backward(self, batch: Batch, *, command: int) -> StepResult:
        """Adds the batch's gradients to those that the ranks hold."""
        shards, rows = await self._split(batch, training=True)
        answers = await self._call_shards("forward_backward", shards, {"command": command})
        self.kernels.came(shards[0].variant, batch)
        return step_result(answers, rows)

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
        variant, shards, rows = await self._variants.choose(
            batch, training=query.training, targets=True, of_inputs=query.input_gradients, reads=True
        )
        if query.per_example and not (varies(variant) and least_rows(variant) <= 1):
            raise FailedPrecondition(
                "the program was exported for batches of several examples, and has no graph for one alone",
                reason="ROWS_NOT_OPEN",
                field="per_example",
            )
        extra = {"query": _query_fields(query), "command": command, "vectors": dict(vectors or {})}
        answers = await self._call_shards("compute_gradients", shards, extra, changes=False)
        return await gradient_result(answers, variant, shards, rows, self._writer, per_example=query.per_example)

    async def forward(self, inputs: Value, *, training: bool, seed: int | None, command: int) -> ForwardResult:
        """The outputs for the inputs. In training mode buffers move."""
        variant, shards, _ = await self._variants.choose(
            Batch(inputs), training=training, targets=False, reads=not training
        )
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
        self.retained.settings_changed()
        if update.trainable:
            self.kernels.drop()
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
        tried = self._variants.example_leaves(variant, example)
        fields = {
            "variant": encode_variant(variant).SerializeToString(),
            "tensors": [asdict(tensor) for tensor in tensors],
            "values": dict(values or {}),
            "operators": dict(operators or {}),
        }
        await self._ranks.call("add_variant", [fields] * self.workers)
        await self._variants.add(variant, tried)

    async def _split(self, batch: Batch, *, training: bool) -> tuple[list[Shard], int]:
        _, shards, rows = await self._variants.choose(batch, training=training, targets=True)
        return shards, rows

    async def _call_shards(
        self,
        kind: str,
        shards: Sequence[Shard],
        extra: Mapping[str, Any],
        *,
        changes: bool = True,
        any_will_do: bool = False,
    ) -> Answers:
        fields = [{"shard": shard_fields(shard), **extra} for shard in shards]
        with self._variants.carried_out():
            return await self._ranks.call(kind, fields, changes=changes, any_will_do=any_will_do)


def _query_fields(query: GradientQuery) -> dict[str, Any]:
    """Not asdict: it copies what cannot change."""
    return {name: getattr(query, name) for name in GradientQuery.__slots__}
