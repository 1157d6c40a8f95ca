"""Keeps what a module computes below a limit: each result's size is found without memory before it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gradwire_proto.errors import ResourceExhausted
from gradwire_workers.programs.size_check import SizesChecked

_META = torch.device("meta")


class SizeWatch:
    """Watches runs on batches that are larger, in any size, than those that were watched before."""

    def __init__(self, tensor_bytes: int) -> None:
        self._tensor_bytes = tensor_bytes
        self._checked: dict[str, SizesChecked] = {}

    def forget(self, kind: str) -> None:
        """Nothing is known of this kind any more: the name will be another's."""
        self._checked.pop(kind, None)

    @contextmanager
    def watch(self, kind: str, leaves: Sequence[Any]) -> Iterator[None]:
        """Inside, a run on `leaves`. Raises ResourceExhausted TENSOR_TOO_LARGE before a result that is too large."""
        sizes = tuple(size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape)
        checked = self._checked.setdefault(kind, SizesChecked())
        if checked.cover(sizes):
            yield
            return
        with _MeasuredOperators(self._tensor_bytes):
            yield
        checked.add(sizes)


class _MeasuredOperators(TorchDispatchMode):
    def __init__(self, tensor_bytes: int) -> None:
        super().__init__()
        self._tensor_bytes = tensor_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for result in self._results(func, args, kwargs):
            if result.numel() * result.element_size() > self._tensor_bytes:
                raise ResourceExhausted(
                    f"{func} would make a tensor {list(result.shape)} of {result.numel() * result.element_size()}"
                    f" bytes; the limit `tensor_bytes` is {self._tensor_bytes}",
                    field="batch.inputs",
                    reason="TENSOR_TOO_LARGE",
                )
        return func(*args, **kwargs)

    def _results(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        try:
            result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        except Exception:
            # What depends on data has no size before it is computed, and is no larger than what it is computed from;
            # what is wrong for other reasons is refused when it is computed.
            return []
        return [each for each in tree_leaves(result) if isinstance(each, Tensor)]


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    return _META if isinstance(value, torch.device) else value
