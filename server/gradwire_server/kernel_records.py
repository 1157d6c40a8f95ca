"""What the journal records of compiled kernels that are taken into use."""

from __future__ import annotations

from gradwire_proto import codec
from gradwire_proto.names import model_name
from gradwire_proto.v1.kernels_pb2 import SwapKernelsRequest
from gradwire_proto.values import BatchShapes

SWAP_KERNELS = "SwapKernels"
"""The method of these records. No client calls it."""


def encode_swap(shapes: BatchShapes, model_id: str) -> bytes:
    """The request of a record."""
    request = SwapKernelsRequest(name=model_name(model_id))
    codec.encode_batch_shapes(shapes, request.batches)
    return request.SerializeToString()


def decode_swap(raw: bytes) -> BatchShapes:
    """The shape that `encode_swap` was given."""
    return codec.decode_batch_shapes(SwapKernelsRequest.FromString(raw).batches)
