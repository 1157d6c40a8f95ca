"""Derivatives of functions that come with the request: no model, no state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from gradwire_proto.errors import Cancelled, Unavailable
from gradwire_proto.values import (
    Batch,
    DerivativeQuery,
    DerivativeResult,
    FunctionSpec,
    GradientQuery,
    GradientResult,
    Limits,
    TensorData,
)
from gradwire_server.calls import Call
from gradwire_server.program_checks import check_function
from gradwire_server.replies import deliver_derivatives, deliver_gradients, timed
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.work_queue import WorkQueue
from gradwire_server.workers import Cluster

T = TypeVar("T")


class FunctionHost:
    """Runs functions one at a time on the rank that the cluster keeps for them."""

    def __init__(self, cluster: Cluster, tensors: TensorStore, limits: Limits, delete_seconds: float) -> None:
        self._cluster = cluster
        self._downloads = tensors.downloads
        self._limits = limits
        self._delete_seconds = delete_seconds
        self._queue = WorkQueue(tensors.uploads, limits.requests_per_model)

    async def compute_gradients(
        self, function: FunctionSpec, batch: Batch, query: GradientQuery, max_inline_bytes: int | None, call: Call
    ) -> GradientResult:
        """The value and gradients of a function. It is cut where it stands when the caller gives up.

        Raises FailedPrecondition FUNCTION_UNKNOWN where it comes without its program and its digest is not known.
        """

        async def compute(whole: FunctionSpec, whole_batch: Batch, _: Any) -> GradientResult:
            return await self._cluster.compute_function_gradients(whole, whole_batch, query)

        async def deliver(result: GradientResult) -> GradientResult:
            return await deliver_gradients(result, self._downloads, max_inline_bytes)

        return await self._run(function, batch, (), compute, deliver, call)

    async def differentiate(
        self,
        function: FunctionSpec,
        batch: Batch,
        query: DerivativeQuery,
        vectors: tuple[TensorData, ...],
        max_inline_bytes: int | None,
        call: Call,
    ) -> DerivativeResult:
        """Another derivative of a function, and its outputs. As for gradients."""

        async def compute(whole: FunctionSpec, whole_batch: Batch, given: Any) -> DerivativeResult:
            return await self._cluster.differentiate_function(whole, whole_batch, query, given)

        async def deliver(result: DerivativeResult) -> DerivativeResult:
            return await deliver_derivatives(result, self._downloads, max_inline_bytes)

        return await self._run(function, batch, vectors, compute, deliver, call)

    async def _run(
        self,
        function: FunctionSpec,
        batch: Batch,
        vectors: tuple[TensorData, ...],
        compute: Callable[[FunctionSpec, Batch, Any], Coroutine[Any, Any, T]],
        deliver: Callable[[T], Awaitable[T]],
        call: Call,
    ) -> T:
        """What `compute` gives for the function, the batch and the vectors, once their tensors are here."""
        if function.program is not None:
            await asyncio.to_thread(check_function, function, self._limits)
        given_up = asyncio.Event()

        async def work(claimed: Any) -> T:
            whole = FunctionSpec(
                digest=function.digest,
                program=function.program,
                tensors=claimed["function"]["tensors"],
                output_leaf=function.output_leaf,
            )
            computing = compute(whole, Batch(**claimed["batch"]), claimed["vectors"])
            return await deliver(await _unless(given_up, computing))

        tensors = {
            "function": {"tensors": function.tensors},
            "batch": {"inputs": batch.inputs, "targets": batch.targets},
            "vectors": vectors,
        }
        try:
            return await self._queue.submit(call, tensors, timed(call, work)).result(call.deadline)
        except asyncio.CancelledError:
            given_up.set()
            raise

    async def close(self) -> None:
        """Refuse what waits; return when what runs has ended, or was cut after delete_seconds."""
        stopping = Unavailable("the service is stopping", reason="DRAINING")
        if not await self._queue.close(stopping, self._delete_seconds):
            await self._queue.cut()

    async def idle(self) -> None:
        """Return when nothing waits or runs."""
        await self._queue.idle()


async def _unless(given_up: asyncio.Event, computing: Coroutine[Any, Any, T]) -> T:
    """What `computing` gives; it is cancelled when `given_up` is set first. A function may take for ever."""
    task, watch = asyncio.ensure_future(computing), asyncio.ensure_future(given_up.wait())
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the caller gave up while the function was computed")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.wait([task])
