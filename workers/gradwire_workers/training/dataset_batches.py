"""Batches made of rows of tensors that stay where they are, as one rank has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire_workers.shard import Shard

_ALIGNMENT = 64
"""Bytes: what torch's allocator aligns to. Elsewhere, libraries may compute other bits."""


@dataclass(frozen=True, kw_only=True)
class BatchKind:
    """Batches of one size, on one rank: `shard` is such a one, and its leaves hold all examples instead of its own.

    split_inputs, split_targets: which leaves the ranks share; of others each rank has all rows of a batch.
    """

    shard: Shard
    split_inputs: Sequence[bool]
    split_targets: Sequence[bool]


class DatasetBatches:
    """The shards of one rank, step by step. A shard's tensors are good until the next one is asked for.

    kinds: by rows of a batch. first: the position in its epoch of the first batch. order: the rows of the batches, one
    after another; None: as they are stored.
    """

    def __init__(
        self,
        kinds: Sequence[BatchKind],
        *,
        examples: int,
        batch_size: int,
        first: int,
        steps: int,
        order: Tensor | None,
    ) -> None:
        self._rows = {kind.shard.rows: _RowsOfKind(kind) for kind in kinds}
        self._examples = examples
        self._batch_size = batch_size
        self._first = first
        self._steps = steps
        self._order = order

    def __iter__(self) -> Iterator[Shard]:
        row, taken, order = self._first * self._batch_size, 0, self._order
        for _ in range(self._steps):
            rows = min(self._batch_size, self._examples - row)
            of_kind = self._rows[rows]
            yield of_kind.stored(row) if order is None else of_kind.ordered(order[taken : taken + rows])
            taken += rows
            row = 0 if row + rows >= self._examples else row + rows


class _RowsOfKind:
    def __init__(self, kind: BatchKind) -> None:
        shard = kind.shard
        start, stop = shard.start, shard.stop
        # A rank without a row has a dummy.
        self._own = (start, stop) if stop > start else (0, 1)
        self._whole = (0, shard.rows)
        self._shard = shard
        self._leaves = [
            (leaf, self._own if is_split else self._whole)
            for leaf, is_split in (
                *zip(shard.inputs, kind.split_inputs, strict=True),
                *zip(shard.targets, kind.split_targets, strict=True),
            )
        ]
        self._inputs = len(shard.inputs)
        self._buffers: list[Tensor | None] = [None] * len(self._leaves)
        self._last: tuple[int, Shard] | None = None

    def stored(self, row: int) -> Shard:
        """The shard of the batch that begins at this row."""
        if self._last is not None and self._last[0] == row:
            return self._last[1]
        found = self._made(
            [
                self._aligned(index, leaf[row + first : row + last]) if isinstance(leaf, Tensor) else leaf
                for index, (leaf, (first, last)) in enumerate(self._leaves)
            ]
        )
        self._last = row, found
        return found

    def ordered(self, rows: Tensor) -> Shard:
        """The shard of the batch of these rows."""
        return self._made(
            [
                torch.index_select(leaf, 0, rows[first:last], out=self._buffer(index, leaf, last - first))
                if isinstance(leaf, Tensor)
                else leaf
                for index, (leaf, (first, last)) in enumerate(self._leaves)
            ]
        )

    def _made(self, leaves: list[Any]) -> Shard:
        shard = self._shard
        return Shard(
            variant=shard.variant,
            rows=shard.rows,
            start=shard.start,
            stop=shard.stop,
            whole=shard.whole,
            idle=shard.idle,
            inputs=tuple(leaves[: self._inputs]),
            targets=tuple(leaves[self._inputs :]),
        )

    def _aligned(self, index: int, rows: Tensor) -> Tensor:
        if rows.data_ptr() % _ALIGNMENT == 0:
            return rows
        return self._buffer(index, rows, len(rows)).copy_(rows)

    def _buffer(self, index: int, leaf: Tensor, rows: int) -> Tensor:
        buffer = self._buffers[index]
        if buffer is None:
            buffer = self._buffers[index] = leaf.new_empty((rows, *leaf.shape[1:]))
        return buffer
