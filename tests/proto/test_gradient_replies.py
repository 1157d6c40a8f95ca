"""The answer of ComputeGradients put together from bytes says what its message says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwire_proto.encoding.gradient_reply import gradient_reply
from gradwire_proto.encoding.result_codec import decode_gradient_result, encode_gradient_result
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import GradientResult, Handle, TensorData, Timing


def tensor(*shape: int, dtype: str = "float32") -> TensorData:
    return TensorData(dtype, shape, bytes(each % 251 for each in range(TensorData(dtype, shape, b"").nbytes)))


RESULT = GradientResult(
    loss=0.25,
    step=7,
    num_examples=32,
    gradients={"0.weight": tensor(64, 32), "größe": tensor(dtype="float64"), "2.bias": tensor(300)},
    input_gradients={"x": tensor(2, 3)},
    outputs=(tensor(2, 1),),
    timing=Timing(queue=0.5, compute=1.5, total=2.5),
    rank_rows=(16, 16),
)


@pytest.mark.parametrize(
    "gradients",
    [
        RESULT.gradients,
        {name: replace(each, data=memoryview(bytes(each.data))) for name, each in RESULT.gradients.items()},
        {},
        {"a": tensor(2), "empty": tensor(0, 3)},
        {"a": tensor(2), "b": TensorData("float32", (2,), Handle("uploads/u/tensors/0"))},
        {"large": tensor(1 << 19), "a": tensor(2)},
    ],
)
def test_a_reply_says_what_its_message_says(gradients):
    result = replace(RESULT, gradients=gradients)
    # Twice: the second finds what the first has kept.
    for _ in range(2):
        message = pb.ComputeGradientsResponse.FromString(gradient_reply(result))
        assert message == encode_gradient_result(result)
        assert list(decode_gradient_result(message).gradients) == list(gradients)
