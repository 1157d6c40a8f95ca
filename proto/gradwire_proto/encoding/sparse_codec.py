"""Some elements of tensors, to messages and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from gradwire_proto.encoding.scalar_codec import check_text
from gradwire_proto.encoding.tensor_codec import decode_tensor, encode_tensor
from gradwire_proto.v1 import gradient_service_pb2 as service_pb
from gradwire_proto.values import TensorData

SparseData: TypeAlias = "tuple[tuple[int, ...], TensorData, TensorData]"
"""(shape of the whole tensor, row-major indices of the elements, their values)."""


def encode_sparse_tensor(name: str, value: SparseData, into: service_pb.SparseTensor) -> None:
    """The message of some elements of a tensor."""
    into.name = check_text(name, "name")
    shape, indices, values = value
    into.shape.extend(shape)
    encode_tensor(indices, into.indices)
    encode_tensor(values, into.values)


def decode_sparse_tensors(messages: Iterable[service_pb.SparseTensor], field: str) -> dict[str, SparseData]:
    """By name, (shape, row-major indices, values)."""
    return {
        each.name: (
            tuple(each.shape),
            decode_tensor(each.indices, f"{field}[{index}].indices"),
            decode_tensor(each.values, f"{field}[{index}].values"),
        )
        for index, each in enumerate(messages)
    }
