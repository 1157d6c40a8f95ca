"""What tests of models that come back ask of their service."""

from __future__ import annotations

import asyncio
from typing import Any

from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2


def steps(workers: Any) -> list[tuple[bytes, int]]:
    """(batch, number) of every training step that the ranks were asked for."""
    return [(call[1].rstrip(b"\0"), call[2]) for call in workers.calls if call[0] == "train_step"]


async def ready(frontend: Any, model_id: str = "m") -> Any:
    """The model's ranks, once it has been brought back."""
    async with asyncio.timeout(5):
        while (await frontend.model(model_id)).state != model_pb2.MODEL_STATE_READY:
            await asyncio.sleep(0.01)
    return frontend.cluster.groups[model_id]


def get_command(request_id: str) -> pb.GetCommandRequest:
    return pb.GetCommandRequest(name=f"models/m/commands/{request_id}", wait=True)


async def save(frontend: Any, name: str, request_id: str = "") -> Any:
    request = pb.CreateCheckpointRequest(parent="models/m", checkpoint_id=name, request_id=request_id)
    return await frontend.stub.CreateCheckpoint(request)
