"""Requests for a small dataset and for fits on it, and what a fit tells."""

from __future__ import annotations

from typing import Any

import grpc

from gradwire_proto import codec
from gradwire_proto.errors import GradwireError
from gradwire_proto.status import from_rpc_error
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_proto.values import Batch, TensorData

EXAMPLES = bytes(range(80))
"""Ten rows of two floats."""


def creation(data: Any = EXAMPLES, *, dataset_id: str = "d", request_id: str = "", rows: int = 10) -> Any:
    request = pb.CreateDatasetRequest(dataset_id=dataset_id, request_id=request_id)
    codec.encode_batch(Batch(TensorData("float32", (rows, 2), data)), request.batch)
    return request


def fit(request_id: str, **how: Any) -> pb.FitRequest:
    """Three epochs of batches of 4, 4 and 2 rows, where not said otherwise."""
    return pb.FitRequest(
        **{"name": "models/m", "dataset": "datasets/d", "epochs": 3, "batch_size": 4, "request_id": request_id} | how
    )


async def told(frontend: Any, request: pb.FitRequest) -> tuple[list[pb.FitResponse], GradwireError | None]:
    """Every message of a fit, and how it ended."""
    found = []
    try:
        async for message in frontend.stub.Fit(request):
            found.append(message)
    except grpc.aio.AioRpcError as error:
        return found, from_rpc_error(error, command=True)
    return found, None


def losses(messages: list[pb.FitResponse]) -> list[float]:
    return [loss for message in messages for loss in message.losses]
