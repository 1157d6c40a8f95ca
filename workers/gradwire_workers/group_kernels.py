"""Compiled kernels on the ranks of one model: which shapes repeat, what is compiled for them, and what is in use.

Nothing here decides when kernels are taken into use: that is a command of the model, as all that changes its bits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwire_proto.batch_check import flatten
from gradwire_proto.errors import FailedPrecondition, GradwireError, RankLost
from gradwire_proto.values import Batch, BatchShapes, CompiledKernels, LeafShape, TensorData, Value
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.packed_steps import described
from gradwire_workers.ranks import Ranks

logger = logging.getLogger(__name__)

REPEATS = 3
"""Steps after which a shape counts as one that repeats."""

MOST_SHAPES = 8
"""Of how many shapes there can be kernels, for one model."""

_MOST_COUNTED = 256


@dataclass(slots=True)
class _Known:
    """What is known of a shape. shards: as the ranks are told of it, once something is compiled."""

    steps: int = 0
    state: str = "seen"
    reason: str = ""
    shards: list[dict[str, Any]] = field(default_factory=list)


class GroupKernels:
    """See the module. Calls but `came` take turns with all others of the group. wanted: whether any are compiled."""

    def __init__(self, ranks: Ranks, variants: GroupVariants, *, wanted: bool) -> None:
        self.wanted = wanted
        self._ranks = ranks
        self._variants = variants
        self._known: dict[BatchShapes, _Known] = {}

    def came(self, variant: str, batch: Batch, steps: int = 1) -> None:
        """So many training steps on batches of this shape were applied."""
        if not self.wanted:
            return
        shapes = self._shapes_of(variant, batch)
        if shapes not in self._known and len(self._known) >= _MOST_COUNTED:
            self._known = {each: known for each, known in self._known.items() if known.state != "seen"}
        self._known.setdefault(shapes, _Known()).steps += steps

    @property
    def in_use(self) -> tuple[BatchShapes, ...]:
        """The shapes that run on kernels."""
        return tuple(shapes for shapes, known in self._known.items() if known.state == "in_use")

    @property
    def told(self) -> tuple[CompiledKernels, ...]:
        """What became of every shape that repeats."""
        return tuple(
            CompiledKernels(shapes, known.state, known.reason)
            for shapes, known in self._known.items()
            if known.state != "seen"
        )

    async def advance(self, refused: Mapping[BatchShapes, str]) -> BatchShapes | None:
        """Goes on with what is compiled, and changes nothing. Returns a shape whose kernels are ready on every rank and
        agree with eager results: `use` is to follow.

        refused: shapes for which there are to be none, and why. Comparing takes as long as three passes.
        """
        for shapes, known in list(self._known.items()):
            if shapes in refused and known.state not in ("in_use", "refused"):
                await self._refuse(shapes, known, refused[shapes])
            elif known.state == "seen" and known.steps >= REPEATS and len(self.told) < MOST_SHAPES:
                await self._begin(shapes, known)
            elif known.state == "compiling" and await self._is_ready(shapes, known):
                return shapes
        return None

    async def _begin(self, shapes: BatchShapes, known: _Known) -> None:
        known.shards = self._shards_of(shapes)
        await self._call("begin_kernels", known)
        known.state = "compiling"

    async def _is_ready(self, shapes: BatchShapes, known: _Known) -> bool:
        states = await self._call("state_of_kernels", known)
        reason = next((each["reason"] for each in states if each["state"] == "refused"), None)
        if reason is None and any(each["state"] == "compiling" for each in states):
            known.reason = next((each["reason"] for each in states if each["reason"]), "")
            return False
        reason = reason or await self._load(known)
        if reason is None:
            try:
                answers = await self._call("try_kernels", known)
                reason = next((each["refused"] for each in answers if each["refused"] is not None), None)
            except RankLost:
                raise
            except GradwireError as error:
                reason = f"they fail on a batch that is computed eagerly: {error}"
        if reason is not None:
            await self._refuse(shapes, known, reason)
        return reason is None

    async def _refuse(self, shapes: BatchShapes, known: _Known, reason: str) -> None:
        logger.info("no kernels for %s: %s", shapes, reason)
        if known.shards:
            await self._call("forget_kernels", known)
        known.state, known.reason = "refused", reason

    async def _load(self, known: _Known) -> str | None:
        """Have them loaded on every rank, however long it takes. Returns why they cannot be."""
        answers = await self._call("load_kernels", known)
        return next((each["refused"] for each in answers if each["refused"] is not None), None)

    async def use(self, shapes: BatchShapes, *, again: bool) -> None:
        """Runs steps of this shape on kernels from here on: a command.

        again: it was carried out before, by ranks that are gone. Where there can be no kernels this time, steps run
        eagerly, and agree but for rounding. Otherwise FailedPrecondition (KERNELS_REFUSED), and nothing has changed.
        """
        known = self._known.setdefault(shapes, _Known())
        known.shards = self._shards_of(shapes)
        reason = await self._load(known)
        if reason is not None:
            await self._refuse(shapes, known, reason)
            if not again:
                raise FailedPrecondition(f"there are no kernels: {reason}", reason="KERNELS_REFUSED")
            logger.warning("steps of %s ran on kernels, and run eagerly from here on: %s", shapes, reason)
            return
        await self._use(known, changes=True)

    async def _use(self, known: _Known, *, changes: bool) -> None:
        fields = [{"shards": [shard]} for shard in known.shards]
        await self._ranks.call("use_kernels", fields, changes=changes)
        known.state, known.reason = "in_use", ""

    async def resume(self, kernels: Sequence[BatchShapes]) -> None:
        """Runs these shapes on kernels, as the group did whose state has them; compiles what is not there any more.

        Where that cannot be, they run eagerly, and agree but for rounding: `told` says why.
        """
        for shapes in kernels:
            known = self._known[shapes] = _Known(shards=self._shards_of(shapes))
            reason = await self._load(known)
            if reason is None:
                await self._use(known, changes=False)
            else:
                logger.warning("steps of %s ran on kernels, and run eagerly from here on: %s", shapes, reason)
                await self._refuse(shapes, known, reason)

    def drop(self) -> None:
        """Other parameters are trained from here on: the ranks have let go of all kernels."""
        self._known = {}

    async def _call(self, kind: str, known: _Known) -> list[dict[str, Any]]:
        answers = await self._ranks.call(kind, [{"shard": shard} for shard in known.shards], changes=False)
        return answers.fields

    def _shards_of(self, shapes: BatchShapes) -> list[dict[str, Any]]:
        shards = self._variants.shards_of(shapes)
        return [described(shard) for shard in shards]

    def _shapes_of(self, variant_name: str, batch: Batch) -> BatchShapes:
        variant = self._variants.named(variant_name)
        targets = () if batch.targets is None else _shapes(variant.target_structure, batch.targets)
        return BatchShapes(variant_name, _shapes(variant.input_structure, batch.inputs), targets)


def _shapes(structure: Any, value: Value) -> tuple[LeafShape, ...]:
    found = flatten(structure, value, "batch")
    return tuple(leaf.shape if isinstance(leaf, TensorData) else None for leaf in found)
