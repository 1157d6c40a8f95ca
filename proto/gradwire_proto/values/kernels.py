"""Compiled kernels of a model: for which batches, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

LeafShape: TypeAlias = "tuple[int, ...] | None"
"""A tensor's sizes; None for a constant, which the variant itself tells."""


@dataclass(frozen=True, slots=True)
class BatchShapes:
    """Batches of one variant whose tensors have just these shapes, in the order of the variant's leaves."""

    variant: str
    inputs: tuple[LeafShape, ...]
    targets: tuple[LeafShape, ...]


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """Kernels for the forward and backward of some batches. `state`: "compiling", "in_use" or "refused"; `reason`: why,
    in words.
    """

    batches: BatchShapes
    state: str
    reason: str = ""
