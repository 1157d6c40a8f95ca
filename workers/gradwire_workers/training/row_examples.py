"""Batches like the example, of other numbers of rows: what `row_check` tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.values import ROWS, Variant
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.closeness import has_rounding

Change = Callable[[Tensor, int], Tensor]
"""A leaf of the example -> one of so many rows."""


def rows_to_try(variant: Variant, rows: int) -> int:
    for symbol in variant.symbols:
        if symbol.name == ROWS:
            rows = max(rows, symbol.min)
            return rows if symbol.max is None else min(rows, symbol.max)
    return rows


def repeated(leaf: Tensor, rows: int) -> Tensor:
    return leaf[torch.arange(rows, device=leaf.device) % leaf.shape[0]]


def changed(change: Change, variant: Variant, inputs: Sequence[Any], rows: int) -> list[Any]:
    return [
        change(leaf, rows) if has_rows(spec) else leaf for leaf, spec in zip(inputs, variant.input_leaves, strict=True)
    ]


def random_like(leaf: Tensor, rows: int) -> Tensor:
    """Random rows like the leaf's. Whole numbers stay ones that the leaf has in that place: they may be indices."""
    generator = torch.Generator().manual_seed(leaf.dim())
    if has_rounding(leaf):
        spread = leaf.std() if leaf.numel() > 1 else torch.ones(())
        noise = torch.randn((rows, *leaf.shape[1:]), generator=generator, dtype=torch.float64)
        return leaf.mean() + (spread.nan_to_num() + 0.1) * noise.to(leaf.device, leaf.dtype)
    return shuffled(leaf, rows)


def shuffled(leaf: Tensor, rows: int) -> Tensor:
    """Random rows of numbers that the leaf has in that place: for what a program asserts of each number."""
    generator = torch.Generator().manual_seed(leaf.dim())
    choice = torch.randint(leaf.shape[0], (rows, *leaf.shape[1:]), generator=generator)
    return leaf.gather(0, choice.to(leaf.device))
