"""What a fit tells while it runs, and at its end."""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_proto.values import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class FitStatus:
    """How far a fit has come, as its callbacks hear it: after some steps, or after the validation of an epoch.

    steps: applied so far, of `total_steps`. epoch: the one that is under way, or was validated, from 0, of `epochs`.
    losses: of the steps since the callback before; empty where it was called for `validation_loss`. seconds: since the
    fit began.
    """

    steps: int
    total_steps: int
    epoch: int
    epochs: int
    losses: tuple[float, ...]
    validation_loss: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What `Model.fit` returns.

    losses: of each step, before its update. steps: applied by this fit. step: updates that the model had applied then.
    epochs: gone through wholly. validation_losses: after each epoch, empty without validation. seconds: in all.
    timing: where the time of the steps went, summed; `total` is that on the frontend. stopped: whether a callback ended
    it early.
    """

    losses: tuple[float, ...]
    steps: int
    step: int
    epochs: int
    validation_losses: tuple[float, ...]
    seconds: float
    timing: Timing
    stopped: bool = False
