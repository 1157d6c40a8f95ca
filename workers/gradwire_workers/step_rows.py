"""What a rank answers of one of several steps, and such answers as results."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from gradwire_proto.values import StepResult, Timing
from gradwire_workers.frames import Frame


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
    return b"".join(map(_packed, rows))


def decode_rows(raw: bytes | memoryview) -> list[StepRow]:
    """The rows that `encode_rows` has encoded."""
    return [_unpacked(*each) for each in _ROW.iter_unpack(raw)]


class RowsPart(NamedTuple):
    """A part of what a rank answers to call number `call`. is_over: the last one. busy: seconds, see Answer."""

    call: int
    is_over: bool
    busy: float
    rows: list[StepRow]


def encode_part(part: RowsPart) -> bytes:
    """A part as a message by itself, of one frame, which no other message looks like: those begin with JSON."""
    return _PART.pack(_IS_PART, part.is_over, part.call, part.busy) + encode_rows(part.rows)


def decode_part(frames: Sequence[Frame]) -> RowsPart | None:
    """The part that these frames are; None where they are another message."""
    first = frames[0]
    if first[0] != _IS_PART:
        return None
    _, is_over, call, busy = _PART.unpack_from(first)
    return RowsPart(call, is_over, busy, decode_rows(memoryview(first)[_PART.size :]))


_IS_PART = 0
_PART = struct.Struct("<B?qd")

_ROW = struct.Struct("<Bq8d")
"""Which may be None and are there, and whether it was skipped, as bits; the step; the other numbers in order."""

_LOSS, _LR, _GRAD_NORM, _LOSS_SCALE, _SKIPPED = 1, 2, 4, 8, 16


def _packed(row: StepRow) -> bytes:
    loss, step, lr, grad_norm, skipped, loss_scale, compute, all_reduce, optimizer, busy = row
    bits = _SKIPPED if skipped else 0
    if loss is None:
        loss = 0.0
    else:
        bits |= _LOSS
    if lr is None:
        lr = 0.0
    else:
        bits |= _LR
    if grad_norm is None:
        grad_norm = 0.0
    else:
        bits |= _GRAD_NORM
    if loss_scale is None:
        loss_scale = 0.0
    else:
        bits |= _LOSS_SCALE
    return _ROW.pack(bits, step, loss, lr, grad_norm, loss_scale, compute, all_reduce, optimizer, busy)


def _unpacked(
    bits: int,
    step: int,
    loss: float,
    lr: float,
    grad_norm: float,
    loss_scale: float,
    *seconds: float,
) -> StepRow:
    return StepRow(
        loss if bits & _LOSS else None,
        step,
        lr if bits & _LR else None,
        grad_norm if bits & _GRAD_NORM else None,
        bits & _SKIPPED > 0,
        loss_scale if bits & _LOSS_SCALE else None,
        *seconds,
    )


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
