"""The part of a batch that one rank computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Rows [start, stop) of a batch of `rows` rows, for one rank.

    A rank for which no row is left has start == stop, and row 0 as a dummy, so that its collectives match the others'.
    whole: nothing is split: rank 0 has the whole batch, every other rank is `idle` and has no leaves.
    inputs, targets: in the order of the variant's leaves, constants included; leaves without rows are there in full.
    Tensors are TensorData on the way, torch's inside a Trainer. targets is empty where there are none.
    """

    variant: str
    rows: int
    start: int
    stop: int
    whole: bool = False
    idle: bool = False
    inputs: tuple[Any, ...]
    targets: tuple[Any, ...]

    @property
    def count(self) -> int:
        """How many rows this rank computes."""
        return self.stop - self.start


def shard_fields(shard: Shard) -> dict[str, Any]:
    """A shard as a message's plain values. Not asdict: it would copy the tensors."""
    return {name: getattr(shard, name) for name in Shard.__slots__}
