"""What a rank reports of a command: torch tensors and seconds.

What every step makes is a NamedTuple, which takes a third of the time that a frozen dataclass does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Seconds(NamedTuple):
    """Where a rank's time went. `compute` leaves out `all_reduce`: the time spent waiting in collectives."""

    compute: float = 0.0
    all_reduce: float = 0.0
    optimizer: float = 0.0


class StepReport(NamedTuple):
    """A training command. `loss`: over the whole batch. `rows`: those that this rank computed.

    `grad_norm`: of the whole batch's gradients, before they were clipped; None where they are not. `skipped`: they had
    overflowed. `loss_scale`: that of the next loss; None where losses are not scaled.
    """

    loss: float | None
    step: int
    rows: int
    lr: float | None
    seconds: Seconds
    grad_norm: float | None = None
    skipped: bool = False
    loss_scale: float | None = None

    def fields(self) -> dict[str, Any]:
        """The report as fields of an answer."""
        return {**self._asdict(), "seconds": self.seconds._asdict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """Gradients over the whole batch.

    gradients: rank 0's alone hold anything, or, of each example, those of this rank's rows; of each a tensor or, of its
    largest elements, (shape, row-major indices, values). input_gradients: of this
    rank's rows (of leaves without rows: of all), None for leaves that have none. outputs: of this rank's rows. Both
    None where not asked for, and on idle ranks.
    """

    loss: float
    step: int
    rows: int
    gradients: dict[str, Any]
    input_gradients: list[Tensor | None] | None
    outputs: list[Any] | None
    seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """`losses`: over each whole batch, in evaluation mode."""

    losses: list[float]
    seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardReport:
    """The outputs of this rank's rows; None on idle ranks."""

    outputs: list[Any] | None
    step: int
    rows: int
    seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedReport:
    """A forward that was retained: outputs as in a ForwardReport.

    differentiable: the leaves of the outputs that backward takes cotangents of; empty on idle ranks. Where rank 0 has
    none, nothing was retained.
    """

    outputs: list[Any] | None
    differentiable: list[int]
    step: int
    rows: int
    seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardReport:
    """A backward. input_gradients: of this rank's rows (of leaves without rows: of all), None where the outputs do not
    depend on the leaf. None where not asked for, and on idle ranks.
    """

    input_gradients: list[Tensor | None] | None
    step: int
    rows: int
    seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivativeReport:
    """A function's outputs, and the tensors of its derivative."""

    outputs: list[Any]
    derivatives: list[Tensor]
    rows: int
    seconds: Seconds
