"""What the loss is multiplied by before a backward in float16, so that small gradients do not become zero.

torch.amp.GradScaler's rule and its defaults. That class itself is not used: it keeps its scale where gradients are,
while here every rank must reach the same verdict, about the sum of all ranks' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.training.option_check import Check, Number

_STATE: dict[str, Check] = {
    "scale": Number(above=0.0),
    "growth_factor": Number(above=1.0),
    "backoff_factor": Number(above=0.0, below=1.0),
    "growth_interval": Number(least=1, whole=True),
    "_growth_tracker": Number(least=0, whole=True),
}


class LossScale:
    """The scale `value`: halved after gradients that overflowed, doubled after 2,000 updates without any."""

    def __init__(self) -> None:
        self.value = 65536.0
        self._growth_factor = 2.0
        self._backoff_factor = 0.5
        self._growth_interval = 2000
        self._growth_tracker = 0

    def update(self, *, overflowed: bool) -> None:
        """What follows from a step that was made, or from one that was skipped because gradients overflowed."""
        if overflowed:
            self.value = _float32(self.value * self._backoff_factor)
            self._growth_tracker = 0
            return
        self._growth_tracker += 1
        if self._growth_tracker == self._growth_interval:
            grown = _float32(self.value * self._growth_factor)
            self.value = grown if math.isfinite(grown) else self.value
            self._growth_tracker = 0

    def state(self) -> dict[str, Any]:
        """What torch.amp.GradScaler.state_dict gives, under the same names."""
        return {
            "scale": self.value,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def checked(self, state: Any, field: str) -> dict[str, Any]:
        """A state that `take` can take. InvalidArgument OPTIMIZER_STATE_MISMATCH at the path of what cannot be one."""
        if not isinstance(state, Mapping) or set(state) != set(_STATE):
            raise _refusal(field, f"a dict of {', '.join(_STATE)}")
        for name, check in _STATE.items():
            expected = check(state[name])
            if expected is not None:
                raise _refusal(f"{field}.{name}", f"{expected}, got {state[name]!r}"[:200])
        if not 0.0 < _float32(state["scale"]) < math.inf:
            raise _refusal(f"{field}.scale", f"a number that float32 can hold, got {state['scale']!r}")
        return dict(state)

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was checked."""
        self.value = _float32(state["scale"])
        self._growth_factor, self._backoff_factor = float(state["growth_factor"]), float(state["backoff_factor"])
        self._growth_interval, self._growth_tracker = state["growth_interval"], state["_growth_tracker"]


def _float32(value: float) -> float:
    """As torch keeps it: it ends at 0, or at infinity, where float32 does."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).item()


def _refusal(field: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"expected {expected}", field=field, reason="OPTIMIZER_STATE_MISMATCH")
