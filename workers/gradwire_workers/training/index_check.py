"""Indices looked at before they are used: on CUDA one that is out of range ends the process instead of failing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def indices_checked() -> AbstractContextManager[Any]:
    """Inside, an operator that would look up an index out of range raises IndexError, on every device."""
    return _IndicesChecked()


class _IndicesChecked(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "embedding":
            _check(args[1], args[0].shape[0], negative=False)
        elif name in ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"):
            for size, indices in zip(args[0].shape, args[1], strict=False):
                if indices is not None and indices.dtype not in (torch.bool, torch.uint8):
                    _check(indices, size, negative=True)
        elif name in ("gather", "index_select", "scatter", "scatter_", "scatter_add", "scatter_add_"):
            if args[0].dim():
                _check(args[2], args[0].shape[args[1]], negative=False)
        elif name in ("nll_loss_forward", "nll_loss2d_forward"):
            _check(args[1][args[1] != args[4]], args[0].shape[1 if args[0].dim() > 1 else 0], negative=False)
        return func(*args, **(kwargs or {}))


def _check(indices: Tensor, size: int, *, negative: bool) -> None:
    if indices.numel() and not -size * negative <= int(indices.min()) <= int(indices.max()) < size:
        raise IndexError(f"index out of range: expected less than {size}")
