"""What runs a subgraph: regions in which gradients are off (or on again), or operators choose their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def run_with_grad_mode(enabled: bool, subgraph: Callable[..., Any], *inputs: Any) -> Any:
    """The subgraph's outputs, computed as under `torch.set_grad_enabled(enabled)`."""
    with torch.set_grad_enabled(enabled):
        return subgraph(*inputs)


def run_with_autocast(
    device: torch.device,
    dtype: torch.dtype | None,
    enabled: bool,
    cache_enabled: bool | None,
    subgraph: Callable[..., Any],
    *inputs: Any,
) -> Any:
    """The subgraph's outputs, computed as under `torch.autocast`."""
    with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled):
        return subgraph(*inputs)
