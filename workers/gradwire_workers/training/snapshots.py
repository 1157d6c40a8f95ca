"""Tensors as they were before a command, to put back what it changed if it fails."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors that a command is about to change in place."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._copies = [tensor.detach().clone() for tensor in tensors]

    def restore(self) -> None:
        """Put everything back. May be repeated."""
        with torch.no_grad():
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(copy)
