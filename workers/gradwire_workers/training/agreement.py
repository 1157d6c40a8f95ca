"""The last collective of a command: after it, every rank goes on to change its state, or none does."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.process_group import ProcessGroups


class Agreement:
    """What the ranks settle together: that all have come this far, the loss, and whether the numbers will do.

    refuses_nan: whether a loss or gradient that is not finite is refused, by every rank, or let through.
    """

    def __init__(self, *, refuses_nan: bool) -> None:
        self._refuses_nan = refuses_nan

    def reach(
        self, groups: ProcessGroups | None, value: Tensor | float | None = None, gradients: Iterable[Tensor | None] = ()
    ) -> float:
        """The sum of all ranks' values. A rank that does not get here makes it fail on all.

        value: this rank's part of a batch's loss; None where the command has no batch.
        Raises InvalidArgument: LOSS_NOT_FINITE at the batch, or GRADIENT_NOT_FINITE where any rank's gradients are not,
        at the batch too, or where there is none at the gradients.
        """
        gradients_refused = self._refuses_nan and not are_finite(gradients)
        total = 0.0 if value is None else float(value)
        if groups is not None:
            settled = groups.all_reduce(torch.tensor([total, gradients_refused], dtype=torch.float64))
            total, gradients_refused = settled[0].item(), settled[1].item() > 0
        if self._refuses_nan and not math.isfinite(total):
            raise InvalidArgument(f"the loss is {total}", field="batch", reason="LOSS_NOT_FINITE")
        if gradients_refused:
            raise InvalidArgument(
                "a gradient holds infinities or numbers that are none",
                field="gradients" if value is None else "batch",
                reason="GRADIENT_NOT_FINITE",
            )
        return total


def are_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Whether no gradient holds infinities or numbers that are none."""
    return all(_is_finite(each) for each in gradients if each is not None)


def _is_finite(gradient: Tensor) -> bool:
    # A sum is finite if all its terms are, unless it overflows: cheap, and asked again where it is not. A number's own
    # isfinite is cheaper than torch's, which takes as long as several kernels.
    return cmath.isfinite(gradient.sum().item()) or bool(gradient.isfinite().all())
