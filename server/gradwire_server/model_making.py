"""How a new model gets its ranks: from what a client sent, or from a checkpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gradwire_proto.errors import Cancelled
from gradwire_proto.values import Batch, ModelInfo, ModelSpec, NamedTensors
from gradwire_server.calls import Call
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.hosted_model import HostedModel
from gradwire_server.hosting import Hosting
from gradwire_server.model_creation import ModelCreation
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.workers import Workers

_SECONDS_TO_ANSWER = 0.5
"""How long before its caller's deadline a model that waits in vain is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """`make` gives a new model of this spec ranks and has it served; `ended` is called with the creation at its end."""

    spec: ModelSpec
    make: Callable[[HostedModel], Awaitable[ModelInfo]]
    ended: Callable[[ModelCreation], None]


def made_of_spec(
    hosting: Hosting, spec: ModelSpec, values: NamedTensors, example: Batch | None, call: Call, wait: float
) -> Making:
    """Of what a client sent. Claims the uploads that it names; raises ModelNotFound UPLOAD_NOT_FOUND.

    wait: seconds that it may wait for capacity.
    """
    spec = hosting.keeping.of(spec)
    batch = {"inputs": example.inputs, "targets": example.targets} if example is not None else None
    claim = hosting.tensors.uploads.claim({"tensors": values, "example": batch})

    async def make(new: HostedModel) -> ModelInfo:
        example = Batch(**claim.value["example"]) if claim.value["example"] is not None else None
        workers = await hosting.cluster.start_group(
            spec, claim.value["tensors"], example, model_id=new.life.id, **_waiting(new, call, wait)
        )
        return await _begun(new, workers, call)

    def ended(creation: ModelCreation) -> None:
        if isinstance(creation.error, Cancelled):
            # Perhaps only the connection broke: then the caller comes back with the same handles.
            claim.give_back()
        else:
            claim.spend()

    return Making(spec=spec, make=make, ended=ended)


def made_of_checkpoint(hosting: Hosting, saved: SavedModel, spec: CurrentSpec, call: Call, wait: float) -> Making:
    """Of a checkpoint, whose files are removed at the end. wait: seconds that it may wait for capacity."""

    async def make(new: HostedModel) -> ModelInfo:
        state = saved.state
        new.description.goes_back_to(spec, state.step)
        try:
            workers = await hosting.cluster.start_group(
                spec.value, state.tensors, None, model_id=new.life.id, state=state, **_waiting(new, call, wait)
            )
            return await _begun(new, workers, call, number=state.command, trained=state.trained)
        finally:
            await in_thread(saved.remove_files)

    # Once more, should it be that `make` was cancelled before it began.
    return Making(spec=spec.value, make=make, ended=lambda _: saved.remove_files())


def _waiting(new: HostedModel, call: Call, seconds: float) -> dict[str, Any]:
    """How `Cluster.start_group` is to wait for capacity: no longer than the caller does, who then hears the numbers."""
    if not seconds:
        return {}
    until = time.monotonic() + seconds
    if call.deadline is not None:
        until = min(until, call.deadline - _SECONDS_TO_ANSWER)
    return {"wait_until": until, "tell": new.description.waits_for}


async def _begun(new: HostedModel, workers: Workers, call: Call, **begin: Any) -> ModelInfo:
    """Serve a new model with these ranks, which are freed where that fails."""
    try:
        return await new.life.begin(workers, call, **begin)
    except BaseException:
        workers.on_lost = None
        await asyncio.shield(workers.close())
        raise
