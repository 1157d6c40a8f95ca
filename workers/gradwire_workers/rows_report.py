"""What ranks find out about splitting a variant's batches. Needs no torch: the frontend reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsReport:
    """How batches may be split. reason: why not at all, in words; None where they may be.

    loss: what the loss is over the rows, where that was found out or said. wrong: what was said and is not so.
    inputs_whole: the gradients of inputs need a batch that is not split. returns_loss: the loss is among the outputs,
    and each rank has its part of it. weight: the key of the LossWeight by which ranks combine the loss; None where its
    kind tells. own_statistics: batch norm normalises each rank's rows by themselves, as was asked for; the rest of what
    is said here holds but for that.
    """

    reason: str | None
    loss: str | None = None
    wrong: str | None = None
    inputs_whole: bool = False
    returns_loss: bool = False
    weight: str | None = None
    own_statistics: bool = False
