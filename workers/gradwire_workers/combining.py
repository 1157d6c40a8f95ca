"""The answers of several ranks as one result."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gradwire_proto.values import (
    BackwardResult,
    DerivativeResult,
    ForwardResult,
    GradientResult,
    Leaf,
    Segment,
    StepResult,
    TensorData,
    Timing,
    Variant,
    unflatten,
)
from gradwire_workers import segments
from gradwire_workers.ranks import Answers
from gradwire_workers.segments import INLINE_BYTES, SegmentWriter
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import combine_leaves


def step_result(answers: Answers, rows: int) -> StepResult:
    """What a training command answers. Loss and step are the same on every rank."""
    first = answers.fields[0]
    return StepResult(
        loss=first["loss"],
        step=first["step"],
        num_examples=rows,
        grad_norm=first["grad_norm"],
        lr=first["lr"],
        timing=timing_of(answers),
        rank_rows=_rank_rows(answers),
        skipped=first["skipped"],
        loss_scale=first["loss_scale"],
    )


async def gradient_result(
    answers: Answers,
    variant: Variant,
    shards: Sequence[Shard],
    rows: int,
    writer: SegmentWriter,
    *,
    per_example: bool = False,
) -> GradientResult:
    """Gradients are rank 0's, already summed; input gradients and outputs are put together from every rank's rows.

    per_example: so are the gradients.
    """
    first = answers.fields[0]
    with _released(answers) as kept:
        gradients = dict(first["gradients"])
        if per_example and len(shards) > 1:
            parts = [list(of_rank.values()) for of_rank in _column(answers, "gradients")]
            combined = await _combine(shards, parts, None, writer)
            gradients = dict(zip(gradients, combined or [], strict=True))
        # A rank's tensors share one file: these may lie beside what is put together.
        kept.append(gradients)
        inputs = await _combine(shards, _column(answers, "input_gradients"), variant.input_leaves, writer)
        kept.append(inputs)
        outputs = await _combine(shards, _column(answers, "outputs"), None, writer)
        kept.append(outputs)
        return GradientResult(
            loss=first["loss"],
            step=first["step"],
            num_examples=rows,
            gradients=gradients,
            input_gradients=None if inputs is None else unflatten(variant.input_structure, inputs),
            outputs=None if outputs is None else unflatten(variant.output_structure, outputs),
            timing=timing_of(answers),
            rank_rows=_rank_rows(answers),
        )


def derivative_result(answers: Answers, variant: Variant) -> DerivativeResult:
    """The one rank's outputs and derivatives. Their files are the caller's."""
    (fields,) = answers.fields
    return DerivativeResult(
        outputs=unflatten(variant.output_structure, fields["outputs"]),
        derivatives=tuple(fields["derivatives"]),
        timing=timing_of(answers),
    )


async def forward_result(
    answers: Answers, variant: Variant, shards: Sequence[Shard], writer: SegmentWriter
) -> ForwardResult:
    """Outputs, put together from every rank's rows."""
    with _released(answers) as kept:
        outputs = await _combine(shards, _column(answers, "outputs"), None, writer)
        kept.append(outputs)
        return ForwardResult(
            outputs=None if outputs is None else unflatten(variant.output_structure, outputs),
            step=answers.fields[0]["step"],
            timing=timing_of(answers),
            rank_rows=_rank_rows(answers),
        )


async def backward_result(
    answers: Answers, specs: Sequence[Leaf], shards: Sequence[Shard], writer: SegmentWriter
) -> BackwardResult:
    """Gradients of inputs, put together from every rank's rows. specs: of the inputs that were retained."""
    with _released(answers) as kept:
        inputs = await _combine(shards, _column(answers, "input_gradients"), specs, writer)
        kept.append(inputs)
        return BackwardResult(
            input_gradients=inputs,
            step=answers.fields[0]["step"],
            timing=timing_of(answers),
            rank_rows=_rank_rows(answers),
        )


@contextmanager
def _released(answers: Answers) -> Iterator[list[Any]]:
    """Releases the files of the answers, except for what is put into the list; on an error, that too."""
    kept: list[Any] = []
    try:
        yield kept
    except BaseException:
        segments.release(*answers.fields, kept)
        raise
    segments.release(*answers.fields, keep=kept)


def _column(answers: Answers, name: str) -> list[Any]:
    return [fields[name] for fields in answers.fields]


def _rank_rows(answers: Answers) -> tuple[int, ...]:
    return tuple(fields["rows"] for fields in answers.fields)


def timing_of(answers: Answers) -> Timing:
    """Where the time of a command went: on the slowest rank, and between ranks and frontend."""
    parts = [fields["seconds"] for fields in answers.fields]
    return Timing(
        transfer=answers.transfer,
        compute=max(part["compute"] for part in parts),
        all_reduce=max(part["all_reduce"] for part in parts),
        optimizer=max(part["optimizer"] for part in parts),
        total=answers.total,
    )


async def _combine(
    shards: Sequence[Shard], parts: Sequence[list[Any] | None], specs: Sequence[Leaf] | None, writer: SegmentWriter
) -> list[Any] | None:
    """One list of leaves per rank -> the whole batch's leaves; None where nobody was asked for any."""
    if parts[0] is None:
        return None
    if len(parts) == 1:
        return parts[0]
    if not _is_big(parts):
        return combine_leaves(shards, parts, specs)
    return await asyncio.to_thread(_combine_parts, shards, parts, specs, writer)


def _combine_parts(
    shards: Sequence[Shard], parts: Sequence[list[Any] | None], specs: Sequence[Leaf] | None, writer: SegmentWriter
) -> list[Any]:
    """The same for tensors that are big, or lie in segments: the result is in a segment."""
    whole = combine_leaves(shards, parts, specs)
    tensors = [leaf for leaf in whole if isinstance(leaf, TensorData)]
    written = iter(writer.write(tensors))
    return [next(written) if isinstance(leaf, TensorData) else leaf for leaf in whole]


def _is_big(parts: Sequence[list[Any] | None]) -> bool:
    tensors = [leaf for part in parts for leaf in part or () if isinstance(leaf, TensorData)]
    return any(isinstance(tensor.data, Segment) for tensor in tensors) or (
        sum(tensor.nbytes for tensor in tensors) >= INLINE_BYTES
    )
