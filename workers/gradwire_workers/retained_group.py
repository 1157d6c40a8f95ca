"""The retained forwards of a worker group: outputs put together from all ranks, cotangents split as those were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import (
    BackwardQuery,
    BackwardResult,
    Batch,
    ForwardResult,
    NamedTensors,
    Retention,
    TensorData,
    Value,
    Variant,
)
from gradwire_workers.after_applied import errors_after_applied
from gradwire_workers.combining import backward_result, forward_result
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.ranks import Ranks
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.shard import Shard, shard_fields
from gradwire_workers.sharding import rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Retained:
    """A forward that every rank has retained. shards: without their leaves.

    parts: for each leaf of the outputs that has a gradient, what it is on each rank, without its bytes.
    """

    variant: Variant
    shards: list[Shard]
    inputs: tuple[int, ...]
    leaves: int
    parts: dict[int, list[TensorData]]


class RetainedGroup:
    """See the module. Calls take turns with all others of the group."""

    def __init__(self, ranks: Ranks, writer: SegmentWriter, variants: GroupVariants) -> None:
        self._ranks = ranks
        self._writer = writer
        self._variants = variants
        self._kept: dict[str, _Retained] = {}

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._kept)

    async def forward(
        self, inputs: Value, retention: Retention, name: str, *, training: bool, seed: int | None, command: int
    ) -> ForwardResult:
        """The outputs for the inputs, retained as `name`. In training mode buffers move."""
        variant, shards, _ = await self._variants.choose(
            Batch(inputs), training=training, targets=False, loss_apart=True
        )
        self._forget(retention.release)
        extra = {
            "retention": asdict(retention),
            "name": name,
            "training": training,
            "seed": seed,
            "command": command,
        }
        fields = [{"shard": shard_fields(shard), **extra} for shard in shards]
        with self._variants.carried_out():
            answers = await self._ranks.call("retained_forward", fields)
        differentiable = answers.fields[0]["differentiable"]
        of_ranks = [each["outputs"] for each in answers.fields]
        if differentiable:
            self._kept[name] = _Retained(
                variant=variant,
                shards=[replace(shard, inputs=(), targets=()) for shard in shards],
                inputs=retention.inputs,
                leaves=len(of_ranks[0]),
                parts={i: [_bare(each[i]) for each in of_ranks if each is not None] for i in differentiable},
            )
        with errors_after_applied():
            result = await forward_result(answers, variant, shards, self._writer)
        return replace(result, retained=name if differentiable else None, differentiable_outputs=tuple(differentiable))

    async def backward(self, query: BackwardQuery, cotangents: Sequence[TensorData | None]) -> BackwardResult:
        """Adds a retained forward's gradients to those that the ranks hold."""
        retained = self._kept.get(query.retained)
        if retained is None:
            raise FailedPrecondition(f"no forward {query.retained} is retained", reason="RETAINED_GONE")
        _check(cotangents, retained)
        fields = [
            {"query": asdict(query), "cotangents": _part(cotangents, retained, rank)}
            for rank in range(len(self._ranks))
        ]
        answers = await self._ranks.call("backward", fields)
        if not query.keep:
            self._forget((query.retained,))
        specs = [retained.variant.input_leaves[index] for index in retained.inputs]
        with errors_after_applied():
            return await backward_result(answers, specs, retained.shards, self._writer)

    async def release(self, names: Sequence[str]) -> None:
        """Lets go of retained forwards; names of none are passed over. No change: they are no part of the state."""
        self._forget(names)
        await self._ranks.call("release", [{"names": list(names)}] * len(self._ranks), changes=False)

    def settings_changed(self) -> None:
        """The ranks have let go of all retained forwards."""
        self._kept.clear()

    async def held_gradients(self, wrt: Sequence[str] | None) -> tuple[NamedTensors, int]:
        """(held gradients by name, updates applied). `wrt`: names or globs, None for all."""
        fields = [{"wrt": None if wrt is None else list(wrt), "wanted": rank == 0} for rank in range(len(self._ranks))]
        answers = await self._ranks.call("held_gradients", fields, changes=False)
        return answers.fields[0]["gradients"], answers.fields[0]["step"]

    async def set_gradients(self, gradients: NamedTensors, dropped: Sequence[str]) -> int:
        """Replaces held gradients, and drops others. Returns the updates applied so far."""
        fields = {"gradients": gradients, "dropped": list(dropped)}
        answers = await self._ranks.call("set_gradients", [fields] * len(self._ranks))
        return answers.fields[0]["step"]

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._kept.pop(name, None)


def _bare(tensor: TensorData) -> TensorData:
    return TensorData(tensor.dtype, tensor.shape, b"")


def _check(cotangents: Sequence[TensorData | None], retained: _Retained) -> None:
    """Refuse cotangents that are not like the outputs."""
    if len(cotangents) != retained.leaves:
        message = f"expected {retained.leaves} items, one for each leaf of the outputs, got {len(cotangents)}"
        raise InvalidArgument(message, field="cotangents", reason="COTANGENT_MISMATCH")
    for index, cotangent in enumerate(cotangents):
        if cotangent is None:
            continue
        field = f"cotangents[{index}]"
        if index not in retained.parts:
            message = "expected none: the output depends on nothing that requires a gradient"
            raise InvalidArgument(message, field=field, reason="COTANGENT_MISMATCH")
        parts = retained.parts[index]
        expected = parts[0].shape
        if len(parts) > 1:
            expected = (sum(part.shape[0] for part in parts), *expected[1:])
        if (cotangent.dtype, cotangent.shape) != (parts[0].dtype, expected):
            raise InvalidArgument(
                f"expected {parts[0].dtype}{list(expected)}, got {cotangent.dtype}{list(cotangent.shape)}",
                field=field,
                reason="COTANGENT_MISMATCH",
            )


def _part(cotangents: Sequence[TensorData | None], retained: _Retained, rank: int) -> list[TensorData | None]:
    """The cotangents of one rank's rows."""
    if retained.shards[rank].idle:
        return []
    if retained.shards[0].whole or len(retained.shards) == 1:
        return list(cotangents)
    found: list[TensorData | None] = []
    for index, cotangent in enumerate(cotangents):
        if cotangent is None:
            found.append(None)
            continue
        rows = [part.shape[0] for part in retained.parts[index]]
        found.append(rows_of(cotangent, sum(rows[:rank]), sum(rows[: rank + 1])))
    return found
