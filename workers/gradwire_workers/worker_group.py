"""The ranks of one model, called as one: a batch is split over them, and their answers become one result.

One command at a time. A command that fails has changed nothing on any rank, and the group goes on; where that cannot
be had (a rank died, or failed in the middle of its update), the group is lost and says so to every later call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from gradwire_proto.batch_check import check_batch, select_variant
from gradwire_proto.batch_form import BatchForm, FormedStep
from gradwire_proto.codec import encode_optimizer, encode_variant
from gradwire_proto.errors import FailedPrecondition, GradwireError, RankLost
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
    TensorData,
    Value,
    Variant,
    leaves,
)
from gradwire_workers.after_applied import errors_after_applied
from gradwire_workers.combining import forward_result, gradient_result, step_result
from gradwire_workers.group_state import model_state
from gradwire_workers.open_variants import OpenVariants
from gradwire_workers.packed_steps import Layout, Layouts, pack_steps
from gradwire_workers.pool.lease import Lease
from gradwire_workers.ranks import Answers, Ranks
from gradwire_workers.retained_group import RetainedGroup
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.salvage import salvage
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import least_rows, split
from gradwire_workers.step_dispatch import StepDispatch
from gradwire_workers.step_rows import step_result as packed_result
from gradwire_workers.variant_splits import (
    ExampleLeaves,
    FoundBefore,
    TrialTime,
    VariantSplits,
    example_needed,
    loss_weight_is_wrong,
    varies,
)

logger = logging.getLogger(__name__)

_ONE_RANK = Sharding("rows", "one rank computes every batch")
_SPLIT = SplitDecision(whole=None, inputs_whole=False, returns_loss=False, loss=None, weight=None)
_UNKNOWN = replace(_SPLIT, whole="nobody has tried whether its rows are independent")
_ROWS = Sharding("rows", "rows are independent: each rank computes its share of a batch")


class WorkerGroup:
    """See the module. Made by `Cluster.start_group`; calls must not overlap, and must not be cancelled halfway.

    loss_is_given: the client said what the loss is over the rows, which is to be tried. threads: torch's in each rank.
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
        loss_is_given: bool = False,
        threads: int = 1,
        release: Callable[[bool], Awaitable[None]],
    ) -> None:
        self.device = device
        self.sharding = _ONE_RANK if len(ranks) == 1 else _ROWS
        self.tensors: tuple[StateTensor, ...] = ()
        """An architecture's, as the ranks have built it."""
        self.opening: OpenVariants | None = None
        """Makes variants for the batches of an architecture; None where the client brings them."""
        self.lease: Lease | None = None
        """What it holds of the cluster."""
        self._ranks = ranks
        self._variants = list(variants)
        self._of_reads: list[Variant] = []
        self._untried: Variant | None = None
        self._said: Mapping[str, SplitDecision] = {}
        self._decisions: dict[str, SplitDecision] = {}
        self._threads = threads
        self._writer = writer
        self._require_sharding = require_sharding
        self._splits = VariantSplits(ranks, loss_is_given=loss_is_given)
        self._layouts = Layouts(self._layout)
        self._release = release
        self._closed = False
        self._releasing: asyncio.Future[None] | None = None
        self.retained = RetainedGroup(ranks, writer, self._choose_forward, self._tried, shard_fields)
        """Its forwards that are retained, and the gradients that its ranks hold."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those that there are now, but for those that only reads use."""
        return tuple(self._variants)

    @property
    def splits(self) -> Mapping[str, SplitDecision]:
        """How the batches of its variants are spread: as commands have found it."""
        known = [each for each in self._variants if each is not self._untried]
        return {each.name: self._decisions[each.name] for each in known if each.name in self._decisions}

    def expect(self, splits: Mapping[str, SplitDecision]) -> None:
        """Variants of these names that the next command brings are spread like this: nothing is tried again."""
        self._said = splits

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
            # To its end, whoever is cancelled: nobody could begin it again.
            self._releasing = asyncio.ensure_future(self._release(reuse and self._ranks.lost is None))
            await asyncio.shield(self._releasing)

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
                raise example_needed(self.workers)
        leaves_of = [self._splits.example_leaves(variant, example) for variant in self._variants]
        time, before = TrialTime(), None
        for index, (variant, tried) in enumerate(zip(self._variants, leaves_of, strict=True)):
            # An architecture's rows are guessed from sizes, which may be the same by chance: whole is always right.
            find = self._splits.find if self.opening is None else self._find_or_whole
            found = await find(variant, tried, time, like=before)
            before = FoundBefore(variant=variant, tried=tried, found=found)
            if found.wrong is not None:
                raise loss_weight_is_wrong(variant, index, found.wrong)
            self._settle(variant, found)
        self._tell_sharding()

    def resume(self, state: ModelState) -> None:
        """Spreads batches as the group did whose state this is: nothing is tried again.

        Where that was one rank, nobody knows how several may share a batch: one of them computes it whole. Then
        FailedPrecondition (ROWS_NOT_INDEPENDENT) where sharding is required.
        """
        unknown = _UNKNOWN if len(state.held) == 1 and self.workers > 1 else None
        self._variants += state.opened
        for variant in self._variants:
            decision = state.splits.get(variant.name)
            self._decisions[variant.name] = unknown or decision or _UNKNOWN
        self._tell_sharding()

    def _tell_sharding(self) -> None:
        """Says how batches of the first variant that trains are spread. Refuses it where that is not as required."""
        if not self._variants:
            return
        decisive = next((variant for variant in self._variants if variant.training), self._variants[0])
        decision = self._decisions[decisive.name]
        if self.workers == 1:
            return
        if decision.whole is not None and self._require_sharding:
            raise FailedPrecondition(
                f"batches cannot be split over {self.workers} ranks: {decision.whole}",
                reason="ROWS_NOT_INDEPENDENT",
                field="model.require_sharding",
            )
        if decision.whole is not None:
            self.sharding = Sharding("whole", decision.whole)
        elif decision.loss is not None:
            self.sharding = Sharding("rows", f"{_ROWS.reason}; the loss is {decision.loss}")

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
        opened = [each for each in self._variants if each is not self._untried] if self.opening is not None else ()
        whole, held = self._writer.adopt((dict(whole), list(held)))
        return model_state(whole, held, decisions=self.splits, opened=opened, threads=self._threads)

    async def train_step(self, batch: Batch, *, command: int, lr: float | None = None) -> StepResult:
        """Forward, backward, all-reduce and update. `command` numbers it and seeds its random operators."""
        shards, rows = await self._split(batch, training=True)
        answers = await self._call_shards("train_step", shards, {"command": command, "lr": lr})
        return step_result(answers, rows)

    def together(self, steps: Sequence[FormedStep]) -> int:
        """How many of these steps, from the first, can go to the ranks together; 0: the first must go alone."""
        return len(self._layouts.of_first(steps, len(self._variants)))

    async def train_steps(
        self, steps: Sequence[FormedStep], *, command: int, took: Callable[[list[StepResult]], None]
    ) -> None:
        """`train_step` of steps that can go together, from this command on.

        `took` is called with the results of steps that are applied, in order, as they come. Raises the error of the
        first that is not; those behind it were not begun.
        """
        layouts, number = self._layouts.of_first(steps, len(self._variants)), self._ranks.applied + 1
        fields = [pack_steps(steps, layouts, rank=rank, command=command, number=number) for rank in range(self.workers)]
        rows = iter([layout.rows for layout in layouts])
        dispatch = StepDispatch(
            self._ranks,
            lambda applied, idle: took([packed_result(each, next(rows), transfer=idle) for each in applied]),
        )
        await dispatch.run(fields)

    def _layout(self, form: BatchForm) -> Layout | None:
        """How batches of this form are spread; None where only trying tells."""
        if self._untried is not None:
            return None
        batch = form.numbered
        try:
            variant, rows = select_variant(self._variants, batch, training=True, targets=True)
        except GradwireError:
            return None
        rows = rows if varies(variant) else examples_in(batch)
        whole = self._decisions.get(variant.name, _SPLIT).whole is not None
        return Layout(form, split(variant, rows, batch, ranks=self.workers, whole=whole), rows)

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
        variant, shards, rows = await self._choose(
            batch, training=query.training, targets=True, of_inputs=query.input_gradients, reads=True
        )
        if query.per_example and not (varies(variant) and least_rows(variant) <= 1):
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
        variant, shards, _ = await self._choose(Batch(inputs), training=training, targets=False, reads=not training)
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
        tried = self._splits.example_leaves(variant, example)
        fields = {
            "variant": encode_variant(variant).SerializeToString(),
            "tensors": [asdict(tensor) for tensor in tensors],
            "values": dict(values or {}),
            "operators": dict(operators or {}),
        }
        await self._ranks.call("add_variant", [fields] * self.workers)
        self._variants.append(variant)
        await self._take_in(variant, tried)

    async def _take_in(self, variant: Variant, tried: ExampleLeaves | None) -> None:
        """Find out how the batches of a variant that the ranks have can be spread."""
        if (said := self._said.get(variant.name)) is not None:
            if said.weight is not None and self.workers > 1:
                await self._splits.weigh(variant, said.weight)
            self._decisions[variant.name] = said
            return
        # Until it is known, and should the check fail: the variant is on the ranks, and whole is always right.
        self._decisions[variant.name] = _UNKNOWN
        found = await self._find_or_whole(variant, tried, TrialTime())
        if found.reason is not None:
            logger.info("batches of the variant %s are not split: %s", variant.name, found.reason)
        self._settle(variant, found)

    async def _find_or_whole(
        self, variant: Variant, tried: ExampleLeaves | None, time: TrialTime, *, like: FoundBefore | None = None
    ) -> RowsReport:
        try:
            return await self._splits.find(variant, tried, time, like=like)
        except GradwireError as error:
            if self.rank_lost is not None:
                raise
            return RowsReport(reason=f"the example could not be computed: {error}")

    async def _split(self, batch: Batch, *, training: bool) -> tuple[list[Shard], int]:
        _, shards, rows = await self._choose(batch, training=training, targets=True)
        return shards, rows

    def _settle(self, variant: Variant, found: RowsReport) -> None:
        self._decisions[variant.name] = SplitDecision(
            whole=found.reason,
            inputs_whole=found.inputs_whole,
            returns_loss=found.returns_loss,
            loss=found.loss,
            weight=found.weight,
        )

    async def _choose(
        self,
        batch: Batch,
        *,
        training: bool,
        targets: bool,
        of_inputs: bool = False,
        loss_apart: bool = False,
        reads: bool = False,
    ) -> tuple[Variant, list[Shard], int]:
        """(the variant that the batch fits, the ranks' shards of it, its rows).

        of_inputs: gradients of inputs are wanted. loss_apart: a loss among the outputs is differentiated by itself.
        reads: the model is read only.
        """
        variant, rows = await self._fitting(batch, training=training, targets=targets, reads=reads)
        rows = rows if varies(variant) else examples_in(batch)
        decision = self._decisions.get(variant.name, _SPLIT)
        whole = (
            decision.whole is not None
            or (of_inputs and decision.inputs_whole)
            or (loss_apart and decision.returns_loss)
        )
        return variant, split(variant, rows, batch, ranks=self.workers, whole=whole), rows

    async def _fitting(self, batch: Batch, *, training: bool, targets: bool, reads: bool) -> tuple[Variant, int]:
        """(the variant that the batch fits, its rows); an architecture's is made if need be.

        One whose first command failed is forgotten then: what no loss takes must not use up the variants that there
        may be. One that a read has made is no command's: who applies the commands alone must get what they gave here.
        """
        if self._untried is not None:
            for known in (self._variants, self._of_reads):
                if self._untried in known:
                    known.remove(self._untried)
            self._untried = None
        known = [*self._variants, *self._of_reads] if reads else self._variants
        try:
            return select_variant(known, batch, training=training, targets=targets)
        except GradwireError:
            if self.opening is None:
                raise
        variant = await self.opening.open(batch, known, training=training, reads=reads)
        (self._of_reads if reads else self._variants).append(variant)
        self._untried = variant
        await self._take_in(variant, self._splits.example_leaves(variant, batch))
        return variant, check_batch(variant, batch, targets=targets)

    async def _choose_forward(self, batch: Batch, training: bool) -> tuple[Variant, list[Shard]]:
        variant, shards, _ = await self._choose(batch, training=training, targets=False, loss_apart=True)
        return variant, shards

    async def _call_shards(
        self, kind: str, shards: Sequence[Shard], extra: Mapping[str, Any], *, changes: bool = True
    ) -> Answers:
        fields = [{"shard": shard_fields(shard), **extra} for shard in shards]
        with self._tried():
            return await self._ranks.call(kind, fields, changes=changes)

    @contextmanager
    def _tried(self) -> Iterator[None]:
        """Inside, the ranks carry out a command of the last variant that was chosen."""
        try:
            yield
        except GradwireError as error:
            if error.outcome == "applied":
                self._untried = None
            raise
        self._untried = None


def examples_in(batch: Batch) -> int:
    """Dimension 0 of the first tensor, at least 1: what a batch of fixed size counts as."""
    shapes = (leaf.shape for _, leaf in leaves(batch.inputs) if isinstance(leaf, TensorData))
    # Never 0: a shard of no rows is a dummy, whose gradients do not count.
    return max(1, next((shape[0] for shape in shapes if shape), 1))


def shard_fields(shard: Shard) -> dict[str, Any]:
    """A shard as a message's plain values. Not asdict: it would copy the tensors."""
    return {name: getattr(shard, name) for name in Shard.__slots__}
