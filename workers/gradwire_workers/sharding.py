"""Batches into shards, without copies, and the ranks' results into those of the whole batch. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from gradwire_proto.batch_check import flatten
from gradwire_proto.values import ITEM_SIZE, ROWS, Batch, Leaf, Segment, TensorData, TensorSpec, Variant, leaves
from gradwire_workers.shard import Shard


def row_range(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """[start, stop) of a rank: rows in order, as even as can be, earlier ranks having one more."""
    each, more = divmod(rows, ranks)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def smallest_share(rows: int, ranks: int) -> int:
    """The fewest rows that a rank computes: 1 is a rank's that has none, as it computes a dummy."""
    return max(rows // ranks, 1)


def least_rows(variant: Variant) -> int:
    """The fewest rows for which the variant's graph is known to be right."""
    return next((symbol.min for symbol in variant.symbols if symbol.name == ROWS), 0)


def examples_in(batch: Batch) -> int:
    """Dimension 0 of the first tensor, at least 1: what a batch of fixed size counts as."""
    shapes = (leaf.shape for _, leaf in leaves(batch.inputs) if isinstance(leaf, TensorData))
    # Never 0: a shard of no rows is a dummy, whose gradients do not count.
    return max(1, next((shape[0] for shape in shapes if shape), 1))


def split(variant: Variant, rows: int, batch: Batch, *, ranks: int, whole: bool) -> list[Shard]:
    """One shard for each rank of a batch that fits the variant; `whole`: everything for rank 0.

    So too where some rank would get fewer rows than the variant is known to be right for.
    """
    inputs = flatten(variant.input_structure, batch.inputs, "batch.inputs")
    targets = [] if batch.targets is None else flatten(variant.target_structure, batch.targets, "batch.targets")
    whole = whole or (ranks > 1 and smallest_share(rows, ranks) < least_rows(variant))
    if whole or ranks == 1:
        first = Shard(
            variant=variant.name,
            rows=rows,
            start=0,
            stop=rows,
            whole=whole,
            inputs=tuple(inputs),
            targets=tuple(targets),
        )
        idle = Shard(
            variant=variant.name, rows=rows, start=rows, stop=rows, whole=True, idle=True, inputs=(), targets=()
        )
        return [first] + [idle] * (ranks - 1)
    shards = []
    for rank in range(ranks):
        start, stop = row_range(rows, ranks, rank)
        cut = (start, stop) if stop > start else (0, 1)
        shards.append(
            Shard(
                variant=variant.name,
                rows=rows,
                start=start,
                stop=stop,
                inputs=_cut(inputs, variant.input_leaves, *cut),
                targets=_cut(targets, variant.target_leaves, *cut),
            )
        )
    return shards


def combine_leaves(
    shards: Sequence[Shard], parts: Sequence[Sequence[Any] | None], specs: Sequence[Leaf] | None
) -> list[Any]:
    """The whole batch's leaves, from one list of leaves for each rank; an idle rank's is None.

    specs: which leaves have rows; None for outputs, whose tensors all have them when a batch is split, but for a
    loss. A leaf without rows is rank 0's.
    """
    first = parts[0]
    assert first is not None, "rank 0 is never idle"
    if shards[0].whole or len(parts) == 1:
        return list(first)
    combined = []
    for index, leaf in enumerate(first):
        is_split = specs is None or has_rows(specs[index])
        if is_split and isinstance(leaf, TensorData) and leaf.shape:
            combined.append(combine_rows([part[index] for part in parts if part is not None]))
        else:
            combined.append(leaf)
    return combined


def combine_rows(parts: Sequence[TensorData]) -> TensorData:
    """The parts, one after another along dimension 0."""
    filled = [part for part in parts if part.shape[0]]
    if len(filled) <= 1:
        return filled[0] if filled else parts[0]
    data = b"".join(_bytes(part.data) for part in filled)
    return TensorData(parts[0].dtype, (sum(part.shape[0] for part in filled), *parts[0].shape[1:]), data)


def has_rows(leaf: Leaf) -> bool:
    """Whether dimension 0 of a leaf is the batch's rows."""
    return isinstance(leaf, TensorSpec) and leaf.has_rows


def _cut(leaves: Sequence[Any], specs: Sequence[Leaf], start: int, stop: int) -> tuple[Any, ...]:
    return (
        tuple(rows_of(leaf, start, stop) if has_rows(spec) else leaf for leaf, spec in zip(leaves, specs, strict=True))
        if leaves
        else ()
    )


def rows_of(tensor: TensorData, start: int, stop: int) -> TensorData:
    """Rows [start, stop) of a tensor, not copied."""
    row = prod(tensor.shape[1:]) * ITEM_SIZE[tensor.dtype]
    data = tensor.data
    if isinstance(data, Segment):
        part: Any = Segment(data.path, data.offset + start * row, (stop - start) * row)
    else:
        part = memoryview(data).cast("B")[start * row : stop * row]  # type: ignore[arg-type]
    return TensorData(tensor.dtype, (stop - start, *tensor.shape[1:]), part)


def _bytes(data: Any) -> Any:
    if not isinstance(data, Segment):
        return memoryview(data).cast("B")
    with open(data.path, "rb") as file:
        file.seek(data.offset)
        return file.read(data.nbytes)
