"""Results as replies can carry them: with the time they took, and large tensors apart."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

from gradwire_proto.values import (
    BackwardResult,
    DerivativeResult,
    ForwardResult,
    GradientResult,
    StepResult,
    StepsResult,
    Timing,
    tensors_in,
)
from gradwire_server.calls import Call
from gradwire_server.tensors.downloads import Downloads
from gradwire_server.tensors.held_files import remove_files, segment_paths

T = TypeVar("T")


def timed(call: Call, work: Callable[[Any], Awaitable[T]]) -> Callable[[Any], Awaitable[T]]:
    """`work`, whose result tells how long it waited from now until it began, and took in all."""
    submitted = time.monotonic()

    async def run(values: Any) -> T:
        queue = time.monotonic() - submitted
        return with_times(await work(values), call, queue)

    return run


def with_times(result: T, call: Call, queue: float, recovery: float = 0.0) -> T:
    """`result` with the seconds that it waited, had to wait for lost ranks, and took in all, if it tells times."""
    if not isinstance(
        result, (StepResult, StepsResult, GradientResult, DerivativeResult, ForwardResult, BackwardResult)
    ):
        return result
    parts = result.timing
    # Not dataclasses.replace, which takes five times as long.
    timing = Timing(
        queue=queue,
        transfer=parts.transfer,
        compute=parts.compute,
        all_reduce=parts.all_reduce,
        optimizer=parts.optimizer,
        recovery=recovery,
        total=time.monotonic() - call.arrived,
    )
    if isinstance(result, StepResult):
        return cast(T, _timed_step(result, timing))
    if type(result) is GradientResult:
        return cast(T, _timed_gradients(result, timing))
    return replace(result, timing=timing)


def _timed_step(result: StepResult, timing: Timing) -> StepResult:
    return StepResult(
        loss=result.loss,
        step=result.step,
        num_examples=result.num_examples,
        grad_norm=result.grad_norm,
        lr=result.lr,
        timing=timing,
        rank_rows=result.rank_rows,
        skipped=result.skipped,
        loss_scale=result.loss_scale,
    )


def _timed_gradients(result: GradientResult, timing: Timing) -> GradientResult:
    return GradientResult(
        loss=result.loss,
        step=result.step,
        num_examples=result.num_examples,
        gradients=result.gradients,
        input_gradients=result.input_gradients,
        outputs=result.outputs,
        timing=timing,
        rank_rows=result.rank_rows,
    )


async def deliver_gradients(
    result: GradientResult, downloads: Downloads, max_inline_bytes: int | None
) -> GradientResult:
    """`result` with its tensors inline or, together above `max_inline_bytes`, as handles of one download."""
    parts = {"gradients": dict(result.gradients), "input_gradients": result.input_gradients, "outputs": result.outputs}
    delivered = await downloads.deliver(parts, max_inline_bytes)
    return result if delivered is parts else replace(result, **delivered)


async def deliver_derivatives(
    result: DerivativeResult, downloads: Downloads, max_inline_bytes: int | None
) -> DerivativeResult:
    """The same for another derivative of a function."""
    parts = {"outputs": result.outputs, "derivatives": result.derivatives}
    return replace(result, **await downloads.deliver(parts, max_inline_bytes))


async def deliver_outputs(result: ForwardResult, downloads: Downloads, max_inline_bytes: int | None) -> ForwardResult:
    """The same for outputs."""
    return replace(result, outputs=await downloads.deliver(result.outputs, max_inline_bytes))


def without_tensors(result: T) -> T:
    """A result that nobody asks for: its tensors' files are removed."""
    if isinstance(result, ForwardResult):
        remove_files(segment_paths(tensors_in(result.outputs)))
        return replace(result, outputs=())
    if isinstance(result, BackwardResult):
        remove_files(segment_paths(tensors_in(result.input_gradients)))
        return replace(result, input_gradients=None)
    return result


def inline_bytes(value: Any) -> int:
    """How many bytes of tensors a delivered value holds in memory."""
    tensors = tensors_in(value)
    return sum(len(tensor.data) for tensor in tensors if isinstance(tensor.data, (bytes, bytearray, memoryview)))
