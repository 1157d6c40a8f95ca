"""How large a module will be, found by making it without memory: nothing is allocated for one that is too large."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.values import ITEM_SIZE, Limits
from gradwire_workers.architectures.module_tensors import describe_tensors

MAX_OPERATIONS = 20_000
"""Each parameter takes one or two to be made: GPT-2 of 48 layers takes 970."""


def check_size(make: Callable[[], nn.Module], limits: Limits, field: str) -> None:
    """Raise ResourceExhausted (MODEL_TOO_LARGE, TENSOR_TOO_LARGE) where the module that `make` makes is too large."""
    with torch.device("meta"), _CountedOperations(field):
        module = make()
    total = 0
    for tensor in describe_tensors(module)[0]:
        size = prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
        if size > limits.tensor_bytes:
            raise ResourceExhausted(
                f"{tensor.name} would be {tensor.dtype}{list(tensor.shape)}, of {size} bytes; the limit `tensor_bytes`"
                f" is {limits.tensor_bytes}",
                field=field,
                reason="TENSOR_TOO_LARGE",
            )
        total += 0 if tensor.alias_of else size
    if total > limits.model_bytes:
        raise ResourceExhausted(
            f"its parameters and buffers would have {total} bytes; the limit `model_bytes` is {limits.model_bytes}",
            field=field,
            reason="MODEL_TOO_LARGE",
        )


class _CountedOperations(TorchDispatchMode):
    """Ends what makes more and more tensors."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self._field = field
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._count += 1
        if self._count > MAX_OPERATIONS:
            raise ResourceExhausted(
                f"to make it takes more than {MAX_OPERATIONS} operations", field=self._field, reason="MODEL_TOO_LARGE"
            )
        return func(*args, **(kwargs or {}))
