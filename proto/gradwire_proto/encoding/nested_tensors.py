"""The tensors of a nested value's message."""

from __future__ import annotations

from collections.abc import Iterator

from gradwire_proto.v1 import tensor_pb2


def tensors_of(value: tensor_pb2.Value) -> Iterator[tensor_pb2.Tensor]:
    """In order."""
    kind = value.WhichOneof("kind")
    if kind == "tensor":
        yield value.tensor
    elif kind in ("tuple", "list"):
        for item in getattr(value, kind).items:
            yield from tensors_of(item)
    elif kind == "dict":
        for entry in value.dict.entries:
            yield from tensors_of(entry.value)
