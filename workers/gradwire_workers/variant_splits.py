"""How the batches of each variant may be spread over the ranks: asked of the ranks, with an example. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, TypeAlias

from gradwire_proto.batch_check import check_batch, flatten
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import Batch, TensorSpec, Variant
from gradwire_workers.ranks import Ranks
from gradwire_workers.rows_report import RowsReport

ExampleLeaves: TypeAlias = "tuple[tuple[Any, ...], tuple[Any, ...]]"
"""Of inputs, and of targets."""

TRIAL_SECONDS = 20.0
"""How long ranks may try the variants of a model, or one that is added, all together: a client waits 60 s by default.

What they have not found out by then runs whole on one rank, which is right, and says so.
"""


class TrialTime:
    """The time in which variants are tried, one after another. Begins when it is made."""

    def __init__(self, seconds: float = TRIAL_SECONDS) -> None:
        self._ends = monotonic() + seconds

    @property
    def seconds(self) -> float:
        """What is left of it."""
        return max(self._ends - monotonic(), 0.0)


@dataclass(frozen=True, kw_only=True)
class FoundBefore:
    """What was found for a variant, with these leaves."""

    variant: Variant
    tried: ExampleLeaves | None
    found: RowsReport


class VariantSplits:
    """Finds out how batches may be split. loss_is_given: the client said what the loss is over the rows."""

    def __init__(self, ranks: Ranks, *, loss_is_given: bool) -> None:
        self._ranks = ranks
        self._loss_is_given = loss_is_given

    def example_leaves(self, variant: Variant, example: Batch | None) -> ExampleLeaves | None:
        """The leaves with which to check the variant's rows; None where there is nothing to check."""
        if not varies(variant):
            return None
        if example is not None:
            # A loss that is by name, or computed on all outputs, is not tried.
            targets = self._is_said(variant) and variant.target_structure is not None
            check_batch(variant, example, targets=targets, field="example")
            inputs = tuple(flatten(variant.input_structure, example.inputs, "example.inputs"))
            if not targets:
                return inputs, ()
            return inputs, tuple(flatten(variant.target_structure, example.targets, "example.targets"))
        if len(self._ranks) == 1:
            return None
        raise example_needed(len(self._ranks))

    async def find(
        self, variant: Variant, tried: ExampleLeaves | None, time: TrialTime, *, like: FoundBefore | None = None
    ) -> RowsReport:
        """Whether the variant's batches may be split. Ranks combine its loss accordingly from here on.

        time: in which to find it out. like: what was found just before for another variant.
        """
        if len(self._ranks) == 1 and (tried is None or not self._is_said(variant)):
            return RowsReport(reason=None)
        if tried is None:
            return RowsReport(reason=None if varies(variant) else "the program was exported for one batch size")
        before = None
        if like is not None and like.tried is not None and _are_same(like.tried, tried):
            before = {"variant": like.variant.name, "found": asdict(like.found)}
        fields = {
            "variant": variant.name,
            "inputs": tried[0],
            "targets": tried[1],
            "seconds": time.seconds,
            "like": before,
        }
        answers = await self._ranks.call("check_rows", [fields] * len(self._ranks), changes=False)
        return RowsReport(**answers.fields[0])

    async def weigh(self, variant: Variant, weight: str) -> None:
        """Ranks combine the variant's loss by the weight of this key, as was found out before."""
        fields = {"variant": variant.name, "weight": weight}
        await self._ranks.call("weigh", [fields] * len(self._ranks), changes=False)

    def _is_said(self, variant: Variant) -> bool:
        """Whether the client said what the loss is over the rows: a single rank tries that too."""
        return self._loss_is_given or variant.weight_graph is not None


def _are_same(one: ExampleLeaves, other: ExampleLeaves) -> bool:
    """Whether they are the very same objects, of one example."""
    return all(
        len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
        for some, others in zip(one, other, strict=True)
    )


def varies(variant: Variant) -> bool:
    """Whether the variant takes batches of several sizes."""
    return any(isinstance(leaf, TensorSpec) and leaf.has_rows for leaf in variant.input_leaves)


def example_needed(ranks: int) -> InvalidArgument:
    """The error of a model that comes without an example."""
    return InvalidArgument(
        f"{ranks} ranks need an example to find out whether rows are independent",
        field="example",
        reason="EXAMPLE_NEEDED",
    )


def loss_weight_is_wrong(variant: Variant, index: int, found: str) -> InvalidArgument:
    """The error of a loss_weight or loss_reduction that does not hold, as ranks found."""
    weighs = variant.weight_graph is not None
    return InvalidArgument(
        f"{'loss_weight' if weighs else 'loss_reduction'} does not hold: {found}, as batches like the example show."
        " Without it the loss is exact too",
        field=f"model.program.graphs.variants[{index}].weight_graph" if weighs else "model.loss_reduction",
        reason="LOSS_WEIGHT_WRONG" if weighs else "LOSS_REDUCTION_WRONG",
    )
