"""An optimizer's step without what torch has around it for its profiler and its compiler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BareStep:
    """Does what `optimizer.step()` does, to the bit; called without a closure, when gradients are in place.

    Torch calls a step through wrappers: one tells the profiler its name, one breaks the compiler's graph twice. On the
    CPU they take longer than the update of a small network. Hooks of the optimizer are not called: nobody sets any.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self._step: Callable[[Any], object] = inspect.unwrap(type(optimizer).step)
        parameters = (each for group in self._groups for each in group["params"])
        # Elsewhere torch takes other kernels.
        self._may_be_plain = type(optimizer) is torch.optim.SGD and all(each.is_cpu for each in parameters)

    def __call__(self) -> None:
        # The wrappers do this too.
        with torch.no_grad():
            self._step(self._optimizer)

    @property
    def is_plain(self) -> bool:
        """Whether a step is nothing but `parameter -= lr * gradient` with one lr for all. Options may change."""
        if not self._may_be_plain or len(self._groups) > 1:
            return False
        group = self._groups[0]
        return not (
            group["momentum"] or group["weight_decay"] or group["maximize"] or group["foreach"] or group["fused"]
        )

    def plain(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """The step where `is_plain`, with these gradients, which need not be in place and stay as they are."""
        change = -self._groups[0]["lr"]
        # What torch.no_grad() does in several calls, which take longer than two layers' updates.
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.add_(gradient, alpha=change)
        finally:
            torch._C._set_grad_enabled(was_enabled)
