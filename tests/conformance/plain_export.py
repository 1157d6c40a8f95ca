"""Whether plain torch.export can trace a case: what it cannot, the service may refuse."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from typing import Any

import torch
from conformance.case import Case
from torch import nn


class _WithLoss(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module = case.module
        self._loss = case.loss

    def forward(self, inputs: Any, targets: Any) -> Any:
        outputs = self.module(**inputs) if isinstance(inputs, dict) else self.module(*inputs)
        return outputs if self._loss in (None, "own") else self._loss(outputs, targets)


def can_export(case: Case) -> bool:
    """Its module, and its loss where it has one, in the mode in which the module is."""
    try:
        with redirect_stderr(io.StringIO()):  # where it prints what it could not finish
            torch.export.export(_WithLoss(case), (case.inputs, case.targets), strict=False)
    except Exception:
        return False
    return True
