"""In which order a fit takes the rows of a dataset."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rows = Callable[[int, int, int], Tensor]
"""Takes (epoch, place in it, count), epochs counted from that of the first batch: the numbers of the rows there."""


class RowOrders:
    """torch.randperm's orders, one for each epoch. The newest is kept: 8 bytes a row."""

    def __init__(self) -> None:
        self._known: tuple[int, int] | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def beginning_with(self, seed: int, rows: int) -> Rows:
        """Those of epochs with so many rows, where `seed` is the first one's, and each has one more than the last."""
        return lambda epoch, place, count: self._of(seed + epoch, rows).narrow(0, place, count)

    def _of(self, seed: int, rows: int) -> Tensor:
        if self._known != (seed, rows):
            # Let go of the one before: there is room for one.
            self._known, self._order = None, torch.empty(0, dtype=torch.int64)
            self._order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
            self._known = (seed, rows)
        return self._order


def recorded(raw: bytes, rows: int, first: int) -> Rows:
    """What a record of an older version says, as 32-bit integers: its rows begin at place `first` of the epoch."""
    order = torch.from_numpy(np.frombuffer(raw, "<i4").astype(np.int64))
    return lambda epoch, place, count: order.narrow(0, epoch * rows + place - first, count)
