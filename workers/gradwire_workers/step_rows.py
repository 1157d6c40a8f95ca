"""What a rank answers of one of several steps, and such answers as results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gradwire_proto.values import StepResult, Timing
from gradwire_workers.frames import from_json, to_json


class StepRow(NamedTuple):
    """One step on one rank, as in StepReport; times are seconds.

    busy: all that it worked on the step.
    """

    loss: float | None
    step: int
    lr: float | None
    grad_norm: float | None
    skipped: bool
    loss_scale: float | None
    compute: float
    all_reduce: float
    optimizer: float
    busy: float


def encode_rows(rows: Sequence[StepRow]) -> bytes:
    """Rows as a message holds them."""
    return to_json(rows).encode()


def decode_rows(raw: bytes | memoryview) -> list[StepRow]:
    """The rows that `encode_rows` has encoded."""
    return [StepRow(*each) for each in from_json(raw)]


def step_result(of_ranks: Sequence[StepRow], rows: int, *, rank_rows: tuple[int, ...], transfer: float) -> StepResult:
    """What a step answers. Loss and step are the same on every rank, so that a lost one need not have told them.

    rank_rows: how many each rank computes. transfer: seconds that no rank was at work.
    """
    first = of_ranks[0]
    alone = len(of_ranks) == 1
    timing = Timing(
        transfer=transfer,
        compute=first.compute if alone else max(each.compute for each in of_ranks),
        all_reduce=first.all_reduce if alone else max(each.all_reduce for each in of_ranks),
        optimizer=first.optimizer if alone else max(each.optimizer for each in of_ranks),
        total=transfer + (first.busy if alone else max(each.busy for each in of_ranks)),
    )
    return StepResult(
        loss=first.loss,
        step=first.step,
        num_examples=rows,
        grad_norm=first.grad_norm,
        lr=first.lr,
        timing=timing,
        rank_rows=rank_rows,
        skipped=first.skipped,
        loss_scale=first.loss_scale,
    )
