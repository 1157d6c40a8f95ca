"""Which rows of a batch one row can reach, whatever the numbers are: a mark is put on it and followed through a graph.

The mark is not-a-number, which arithmetic carries along wherever a value has any part. Whole numbers and truth values
cannot hold it: for those it is kept beside them, and comes back where rounded numbers are made of them. What sorts or
ranks rows against each other may still escape; trying numbers, as `row_check` does too, finds that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gradwire_workers.training.closeness import has_rounding

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def rows_to_mark(least: int, most: int | None, sizes: set[int]) -> int | None:
    """A number of rows by which a dimension of rows is told from the others, of these sizes; None: there is none.

    least, most: how many rows the program takes.
    """
    for rows in _PRIMES:
        if rows >= least and (most is None or rows <= most) and all(size % rows for size in sizes if size):
            return rows
    return None


@dataclass(frozen=True, kw_only=True)
class MarkedRow:
    """One row of a batch of `rows` rows, in tensors of which it is part of dimension 0."""

    row: int
    rows: int

    def put(self, value: Any) -> Any:
        """A copy of the tensor with the mark in its row, where it can hold one."""
        if not has_rounding(value):
            return value
        marked = value.clone()
        marked[self.row] = torch.nan
        return marked

    def has_spread(self, marked: Tensor, clean: Tensor) -> bool:
        """Whether the mark is in other rows than its own. `clean`: the same tensor without any mark."""
        if marked.shape != clean.shape:
            return True
        found = marked.isnan() & ~clean.isnan()
        found[self.row] = False
        return bool(found.any())

    def follow(
        self, run: Callable[[], Sequence[Any]], whole_numbers: Sequence[Any]
    ) -> tuple[Sequence[Any], list[bool]]:
        """(outputs of `run`, whether the mark has spread in each that is no tensor of rounded numbers).

        whole_numbers: the tensors among the inputs that cannot hold the mark, and have rows.
        """
        with torch.no_grad(), _Marks(self) as marks:
            for tensor in whole_numbers:
                marks.keep(tensor, spread=False)
            outputs = run()
        return outputs, [marks.has_spread(output) for output in outputs]


class _Marks(TorchDispatchMode):
    """Carries the mark through every operator that runs inside, where its result cannot, or its arguments could not."""

    def __init__(self, marked: MarkedRow) -> None:
        super().__init__()
        self._marked = marked
        # By identity, with the tensor, whose identity must not pass to another one.
        self._kept: dict[int, tuple[Tensor, bool]] = {}

    def keep(self, tensor: Tensor, *, spread: bool) -> None:
        """The tensor has the mark: in its row, or all over."""
        self._kept[id(tensor)] = (tensor, spread)

    def has_spread(self, value: Any) -> bool:
        return id(value) in self._kept and self._kept[id(value)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        kept = [self._kept[id(tensor)][1] for tensor in inputs if id(tensor) in self._kept]
        if outputs and not any(map(has_rounding, outputs)):
            marks = [each for each in map(self._found_in, inputs) if each is not None]
            if marks and not func._schema.is_mutable:
                # As if there were no mark, for it becomes an index out of any range.
                clean = tree_map_only(Tensor, lambda each: each.nan_to_num() if has_rounding(each) else each, args)
                result = func(*clean, **(kwargs or {}))
                outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            kept += marks
        elif not all(map(has_rounding, outputs)):
            kept += [each for each in map(self._found_in, inputs) if each is not None]
        if kept:
            for output in outputs:
                self._mark(output, any(kept))
        return result

    def _mark(self, output: Tensor, spread: bool) -> None:
        part = self._part(output)
        if not has_rounding(output):
            self.keep(output, spread=spread or part is None)
        elif spread or part is None:
            output.fill_(torch.nan)
        else:
            part.fill_(torch.nan)

    def _found_in(self, tensor: Tensor) -> bool | None:
        """Whether the mark has spread in a tensor that can hold it; None where it is not there."""
        if not has_rounding(tensor):
            return None
        found = tensor.isnan()
        if not found.any():
            return None
        part = self._part(found)
        if part is not None:
            part.fill_(False)
        return part is None or bool(found.any())

    def _part(self, tensor: Tensor) -> Tensor | None:
        """The row's share of the first dimension that rows can be in, alone or with others behind them."""
        for dimension, size in enumerate(tensor.shape):
            if size and size % self._marked.rows == 0:
                share = size // self._marked.rows
                return tensor.narrow(dimension, self._marked.row * share, share)
        return None
