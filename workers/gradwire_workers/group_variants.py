"""The variants of one group of ranks: those that there are, how the batches of each are spread, and what a batch fits.

Spread as was found by trying, as a state says that it was found, or whole, on one rank, which is always right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

from gradwire_proto.batch_check import check_batch, select_variant
from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_proto.values import (
    ITEM_SIZE,
    Batch,
    BatchShapes,
    ConstantSpec,
    Leaf,
    LeafShape,
    ModelState,
    Segment,
    Sharding,
    SplitDecision,
    TensorData,
    Value,
    Variant,
    unflatten,
)
from gradwire_workers.open_variants import OpenVariants
from gradwire_workers.ranks import Ranks
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import examples_in, split
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
_OWN_STATISTICS = (
    "batch norm is not exact, as was asked for (sync_batch_norm=False): each rank's normalises over its own rows, so"
    " that a step depends on how many ranks there are"
)
_ROWS = Sharding("rows", "rows are independent: each rank computes its share of a batch")


class GroupVariants:
    """See the module. Calls take turns with all others of the group.

    variants: those that the ranks are loaded with. opening: makes variants for the batches of an architecture; None
    where the client brings them. loss_is_given: the client said what the loss is over the rows, which is to be tried.
    """

    def __init__(
        self,
        ranks: Ranks,
        variants: Sequence[Variant],
        *,
        opening: OpenVariants | None = None,
        loss_is_given: bool = False,
        require_sharding: bool = False,
    ) -> None:
        self.sharding = _ONE_RANK if len(ranks) == 1 else _ROWS
        self._ranks = ranks
        self._opening = opening
        self._require_sharding = require_sharding
        self._variants = list(variants)
        self._of_reads: list[Variant] = []
        self._untried: Variant | None = None
        self._said: Mapping[str, SplitDecision] = {}
        self._decisions: dict[str, SplitDecision] = {}
        self._splits = VariantSplits(ranks, loss_is_given=loss_is_given)

    @property
    def of_commands(self) -> tuple[Variant, ...]:
        """Those that there are now, but for those that only reads use."""
        return tuple(self._variants)

    @property
    def count(self) -> int:
        """How many these are."""
        return len(self._variants)

    @property
    def opened(self) -> tuple[Variant, ...]:
        """Of those the ones that batches of an architecture have brought, and that a command has used."""
        return () if self._opening is None else tuple(each for each in self._variants if each is not self._untried)

    @property
    def splits(self) -> Mapping[str, SplitDecision]:
        """How the batches of its variants are spread: as commands have found it."""
        known = [each for each in self._variants if each is not self._untried]
        return {each.name: self._decisions[each.name] for each in known if each.name in self._decisions}

    def expect(self, splits: Mapping[str, SplitDecision]) -> None:
        """Variants of these names that the next command brings are spread like this: nothing is tried again."""
        self._said = splits

    async def prepare(self, example: Batch | None) -> None:
        """Finds out how batches can be spread over the ranks.

        InvalidArgument without an example (EXAMPLE_NEEDED), or where it does not fit; FailedPrecondition
        (ROWS_NOT_INDEPENDENT) where sharding is required and impossible.
        """
        if self._opening is not None:
            if example is not None:
                for training in (True, False):
                    self._variants.append(await self._opening.open(example, self._variants, training=training))
            elif len(self._ranks) == 1:
                # Variants are made of the batches that come.
                return
            else:
                raise example_needed(len(self._ranks))
        leaves_of = [self._splits.example_leaves(variant, example) for variant in self._variants]
        time, before = TrialTime(), None
        for index, (variant, tried) in enumerate(zip(self._variants, leaves_of, strict=True)):
            # An architecture's rows are guessed from sizes, which may be the same by chance: whole is always right.
            find = self._splits.find if self._opening is None else self._find_or_whole
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
        unknown = _UNKNOWN if len(state.held) == 1 and len(self._ranks) > 1 else None
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
        if len(self._ranks) == 1:
            return
        if decision.whole is not None and self._require_sharding:
            raise FailedPrecondition(
                f"batches cannot be split over {len(self._ranks)} ranks: {decision.whole}",
                reason="ROWS_NOT_INDEPENDENT",
                field="model.require_sharding",
            )
        if decision.whole is not None:
            self.sharding = Sharding("whole", decision.whole)
            return
        loss = () if decision.loss is None else (f"the loss is {decision.loss}",)
        norms = (_OWN_STATISTICS,) if decision.own_statistics else ()
        self.sharding = Sharding("rows", "; ".join((_ROWS.reason, *loss, *norms)))

    def example_leaves(self, variant: Variant, example: Batch | None) -> ExampleLeaves | None:
        """What `add` tries the variant with. InvalidArgument where the example does not fit, or is needed."""
        return self._splits.example_leaves(variant, example)

    async def add(self, variant: Variant, tried: ExampleLeaves | None) -> None:
        """Takes in a variant that the ranks have got, and finds out how its batches can be spread."""
        self._variants.append(variant)
        await self._take_in(variant, tried)

    async def choose(
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
        return variant, split(variant, rows, batch, ranks=len(self._ranks), whole=whole), rows

    async def choose_rows(self, batch: Batch, *, training: bool) -> tuple[Variant, int, bool]:
        """(the variant that a batch fits, its rows, whether one rank computes it whole).

        training: it is trained on; else the model is read only, in evaluation mode.
        """
        variant, rows = await self._fitting(batch, training=training, targets=True, reads=not training)
        rows = rows if varies(variant) else examples_in(batch)
        return variant, rows, self._decisions.get(variant.name, _SPLIT).whole is not None

    def choose_known(self, batch: Batch) -> tuple[list[Shard], int] | None:
        """(the ranks' shards of a batch to train on, its rows); None where that has to be tried first, or fails."""
        if self._untried is not None:
            return None
        try:
            variant, rows = select_variant(self._variants, batch, training=True, targets=True)
        except GradwireError:
            return None
        rows = rows if varies(variant) else examples_in(batch)
        whole = self._decisions.get(variant.name, _SPLIT).whole is not None
        return split(variant, rows, batch, ranks=len(self._ranks), whole=whole), rows

    def named(self, name: str) -> Variant:
        """The variant of that name, which commands use."""
        return next(each for each in self._variants if each.name == name)

    def shards_of(self, shapes: BatchShapes) -> list[Shard]:
        """The ranks' shards of a batch to train on of these shapes, without bytes."""
        variant = self.named(shapes.variant)
        inputs = _leaves(variant.input_leaves, shapes.inputs)
        targets = _leaves(variant.target_leaves, shapes.targets)
        batch = Batch(unflatten(variant.input_structure, inputs))
        if targets:
            batch = Batch(batch.inputs, unflatten(variant.target_structure, targets))
        rows = check_batch(variant, batch, targets=True)
        rows = rows if varies(variant) else examples_in(batch)
        whole = self._decisions.get(variant.name, _SPLIT).whole is not None
        return split(variant, rows, batch, ranks=len(self._ranks), whole=whole)

    @contextmanager
    def carried_out(self) -> Iterator[None]:
        """Inside, the ranks carry out a command of the last variant that was chosen."""
        try:
            yield
        except GradwireError as error:
            if error.outcome == "applied":
                self._untried = None
            raise
        self._untried = None

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
            if self._opening is None:
                raise
        variant = await self._opening.open(batch, known, training=training, reads=reads)
        (self._of_reads if reads else self._variants).append(variant)
        self._untried = variant
        await self._take_in(variant, self._splits.example_leaves(variant, batch))
        return variant, check_batch(variant, batch, targets=targets)

    async def _take_in(self, variant: Variant, tried: ExampleLeaves | None) -> None:
        """Find out how the batches of a variant that the ranks have can be spread."""
        if (said := self._said.get(variant.name)) is not None:
            if said.weight is not None and len(self._ranks) > 1:
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
            if self._ranks.lost is not None:
                raise
            return RowsReport(reason=f"the example could not be computed: {error}")

    def _settle(self, variant: Variant, found: RowsReport) -> None:
        self._decisions[variant.name] = SplitDecision(
            whole=found.reason,
            inputs_whole=found.inputs_whole,
            returns_loss=found.returns_loss,
            loss=found.loss,
            weight=found.weight,
            own_statistics=found.own_statistics,
        )


def _leaves(leaves: Sequence[Leaf], shapes: Sequence[LeafShape]) -> list[Value]:
    """Leaves of these shapes: tensors without bytes, and the constants that the variant tells."""
    found: list[Value] = []
    for leaf, shape in zip(leaves, shapes, strict=True):
        if isinstance(leaf, ConstantSpec):
            found.append(leaf.value)
        else:
            assert shape is not None
            found.append(TensorData(leaf.dtype, shape, Segment("", 0, prod(shape) * ITEM_SIZE[leaf.dtype])))
    return found
