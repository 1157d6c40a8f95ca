"""Batches to try a program on, made of an example's leaves. The same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.values import Leaf
from gradwire_workers.sharding import has_rows, row_range
from gradwire_workers.training.closeness import has_rounding
from gradwire_workers.training.row_examples import random_like, repeated


@dataclass(frozen=True, kw_only=True)
class TrialBatch:
    """A batch of so many rows."""

    rows: int
    inputs: list[Any]
    targets: list[Any]


@dataclass(frozen=True, kw_only=True)
class TrialBatches:
    """Batches like an example's. inputs, targets: its leaves, and what they are. ranks: over how many they are split.

    numbers: the whole numbers that may mean something to the program, such as "ignored".
    """

    inputs: Sequence[Any]
    targets: Sequence[Any]
    input_leaves: Sequence[Leaf]
    target_leaves: Sequence[Leaf]
    ranks: int
    numbers: Sequence[int]

    def of_rows(self, rows: int, *, more: int, is_told: Callable[[], bool]) -> Iterator[TrialBatch]:
        """Batches of `rows` rows; and some of `more` rows.

        First those that tell most: with each number in each leaf of whole numbers in turn, more of it in later rows;
        then, until `is_told` says that it is enough, all over the last rank's rows, and all over. Then any numbers, and
        the example itself.
        """
        for where in (_more_and_more, _last_share, _everywhere):
            for index, leaf in enumerate((*self.inputs, *self.targets)):
                if not self._specs[index] or not isinstance(leaf, Tensor) or not leaf.numel() or has_rounding(leaf):
                    continue
                for number in self._numbers_for(leaf):
                    if where is _more_and_more or not is_told():
                        yield self._batch(rows, _varied_like, index, lambda x, n=number, w=where: self._put(x, n, w))
        for each in dict.fromkeys((rows, more)):
            yield self._batch(each, any_like)
            yield self._batch(each, random_like)
            yield self._batch(each, repeated)

    @property
    def _specs(self) -> list[bool]:
        return [has_rows(spec) for spec in (*self.input_leaves, *self.target_leaves)]

    def _batch(
        self,
        rows: int,
        change: Callable[[Tensor, int], Tensor],
        chosen: int = -1,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> TrialBatch:
        leaves = []
        for index, (leaf, with_rows) in enumerate(zip((*self.inputs, *self.targets), self._specs, strict=True)):
            made = change(leaf, rows) if with_rows else leaf
            leaves.append(then(made) if then is not None and index == chosen else made)
        return TrialBatch(rows=rows, inputs=leaves[: len(self.inputs)], targets=leaves[len(self.inputs) :])

    def _numbers_for(self, leaf: Tensor) -> Sequence[int]:
        if leaf.dtype is torch.bool:
            return (0, 1)
        bounds = torch.iinfo(leaf.dtype)
        return [each for each in dict.fromkeys((*self.numbers, 1)) if bounds.min <= each <= bounds.max]

    def _put(self, leaf: Tensor, number: int, where: Callable[[Tensor, int], Tensor]) -> Tensor:
        return leaf.masked_fill(where(leaf, self.ranks), number)


def any_like(leaf: Tensor, rows: int) -> Tensor:
    """Random rows in the leaf's bounds, whatever is in which place. Rounded numbers have either sign."""
    generator = torch.Generator().manual_seed(leaf.dim() + 100)
    shape = (rows, *leaf.shape[1:])
    if has_rounding(leaf):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return noise.to(leaf.device, leaf.dtype) * (leaf.abs().mean() + 1)
    if leaf.dtype is torch.bool:
        return (torch.rand(shape, generator=generator) < 0.5).to(leaf.device)
    least, most = int(leaf.min()), int(leaf.max())
    return torch.randint(least, most + 1, shape, generator=generator).to(leaf.device, leaf.dtype)


def _varied_like(leaf: Tensor, rows: int) -> Tensor:
    """Random rows like the leaf's; with some zeros and ones, where its whole numbers are all the same."""
    made = random_like(leaf, rows)
    if has_rounding(leaf) or int(leaf.max()) != int(leaf.min()):
        return made
    generator = torch.Generator().manual_seed(leaf.dim() + 200)
    others = torch.randint(2, made.shape, generator=generator).to(made.device, made.dtype)
    return made.where((torch.rand(made.shape, generator=generator) < 0.6).to(made.device), others)


def _more_and_more(leaf: Tensor, ranks: int) -> Tensor:
    chances = torch.linspace(0.1, 0.8, leaf.shape[0]).reshape(-1, *[1] * (leaf.dim() - 1))
    drawn = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0))
    return (drawn < chances).to(leaf.device)


def _last_share(leaf: Tensor, ranks: int) -> Tensor:
    mask = _more_and_more(leaf, ranks)
    mask[row_range(leaf.shape[0], ranks, ranks - 1)[0] :] = True
    return mask


def _everywhere(leaf: Tensor, ranks: int) -> Tensor:
    return torch.ones_like(leaf, dtype=torch.bool)
