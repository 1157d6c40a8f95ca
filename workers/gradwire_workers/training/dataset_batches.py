"""Batches made of rows of tensors that stay where they are, as one rank has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire_workers.shard import Shard
from gradwire_workers.training.row_orders import Rows

_ALIGNMENT = 64
"""Bytes: what torch's allocator aligns to. Elsewhere, libraries may compute other bits."""

_VIEWS = 4096
"""Shards that are kept for the next epoch at most."""


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

    kinds: by rows of a batch. first: the position in its epoch of the first batch. chosen: which rows come; None: all
    as they are stored.
    """

    def __init__(
        self,
        kinds: Sequence[BatchKind],
        *,
        examples: int,
        batch_size: int,
        first: int,
        steps: int,
        chosen: Rows | None,
    ) -> None:
        self._rows = {kind.shard.rows: _RowsOfKind(kind) for kind in kinds}
        self._examples = examples
        self._batch_size = batch_size
        self._first = first
        self._steps = steps
        self._chosen = chosen

    def __iter__(self) -> Iterator[Shard]:
        epoch, row, chosen = 0, self._first * self._batch_size, self._chosen
        for _ in range(self._steps):
            rows = min(self._batch_size, self._examples - row)
            of_kind = self._rows[rows]
            yield of_kind.stored(row) if chosen is None else of_kind.ordered(chosen(epoch, row, rows))
            row += rows
            if row >= self._examples:
                epoch, row = epoch + 1, 0


class _RowsOfKind:
    """The rank's part of batches of one kind."""

    def __init__(self, kind: BatchKind) -> None:
        shard = kind.shard
        # A rank without a row has a dummy.
        own = (shard.start, shard.stop) if shard.stop > shard.start else (0, 1)
        is_split = (*kind.split_inputs, *kind.split_targets)
        self._shard = shard
        self._leaves = (*shard.inputs, *shard.targets)
        self._inputs = len(shard.inputs)
        self._ranges = [own if each else (0, shard.rows) for each in is_split]
        self._buffers: list[Tensor | None] = [None] * len(self._leaves)
        self._views: dict[int, Shard] = {}
        """Shards by their first row, of which nothing had to be copied."""
        self._chosen: Shard | None = None
        """That of rows in an order: their copies take turns in it."""

    def stored(self, row: int) -> Shard:
        """The shard of the batch that begins at this row."""
        known = self._views.get(row)
        if known is not None:
            return known
        parts, copied = [], False
        for index, (leaf, (first, last)) in enumerate(zip(self._leaves, self._ranges, strict=True)):
            if isinstance(leaf, Tensor):
                leaf = leaf.narrow(0, row + first, last - first)
                if leaf.data_ptr() % _ALIGNMENT:
                    leaf, copied = self._buffer(index, leaf, last - first).copy_(leaf), True
            parts.append(leaf)
        shard = self._made(parts)
        if not copied and len(self._views) < _VIEWS:
            self._views[row] = shard
        return shard

    def ordered(self, rows: Tensor) -> Shard:
        """The shard of the batch of these rows."""
        if self._chosen is None:
            parts = [
                self._buffer(index, leaf, last - first) if isinstance(leaf, Tensor) else leaf
                for index, (leaf, (first, last)) in enumerate(zip(self._leaves, self._ranges, strict=True))
            ]
            self._chosen = self._made(parts)
        for leaf, buffer, (first, last) in zip(self._leaves, self._buffers, self._ranges, strict=True):
            if buffer is not None:
                chosen = rows if last - first == self._shard.rows else rows.narrow(0, first, last - first)
                torch.index_select(leaf, 0, chosen, out=buffer)
        return self._chosen

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

    def _buffer(self, index: int, leaf: Tensor, rows: int) -> Tensor:
        buffer = self._buffers[index]
        if buffer is None:
            buffer = self._buffers[index] = leaf.new_empty((rows, *leaf.shape[1:]))
        return buffer
