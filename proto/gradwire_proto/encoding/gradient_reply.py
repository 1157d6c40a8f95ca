"""The bytes of ComputeGradients' answer, put together without a message for each gradient.

Parameters have the same names, types and shapes in each answer: all but their gradients' bytes is written once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from gradwire_proto.encoding.result_codec import encode_gradient_result
from gradwire_proto.encoding.tensor_codec import encode_named_tensors
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import GradientResult, TensorData

_MOST_HEADS = 8192

_LARGE_BYTES = 1 << 20
"""To write a head takes as many bytes as the gradient has: for larger ones that takes longer than it spares."""


def gradient_reply(value: GradientResult) -> bytes:
    """What `encode_gradient_result(value)` serialized says, the fields in another order."""
    if not value.gradients or not all(map(_is_small, value.gradients.values())):
        return encode_gradient_result(value).SerializeToString()
    parts: list[Any] = [encode_gradient_result(replace(value, gradients={})).SerializeToString()]
    for name, gradient in value.gradients.items():
        parts += (_head(name, gradient.dtype, gradient.shape), gradient.data)
    return b"".join(parts)


def _is_small(gradient: Any) -> bool:
    if type(gradient) is not TensorData or not isinstance(gradient.data, (bytes, memoryview)):
        return False
    return 0 < gradient.nbytes <= _LARGE_BYTES


@lru_cache(maxsize=_MOST_HEADS)
def _head(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What comes before the bytes of a gradient of this name, type and shape. They end its field."""
    nbytes = TensorData(dtype, shape, b"").nbytes
    message = pb.ComputeGradientsResponse()
    encode_named_tensors({name: TensorData(dtype, shape, bytes(nbytes))}, message.gradients)
    return message.SerializeToString()[:-nbytes]
