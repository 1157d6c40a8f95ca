"""Messages that the codec takes, for tests to spoil, and what it says then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gradwire_proto import codec, values
from gradwire_proto.errors import GradwireError
from gradwire_proto.v1 import model_pb2, tensor_pb2

FLOAT32, INT64 = tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_INT64


def tensor(dtype: int = FLOAT32, shape: tuple[int, ...] = (2,), **content: object) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, **content)  # type: ignore[arg-type]


def refusal(decode: Callable[[], object]) -> GradwireError:
    with pytest.raises(GradwireError) as caught:
        decode()
    return caught.value


def smallest_variant(**changes: object) -> values.Variant:
    fields = {
        "name": "train",
        "training": True,
        "graph": values.Graph(("x",), (), (values.NodeRef("x"),)),
        "graph_inputs": (values.GraphInput("input", 0),),
        "input_structure": values.LeafRef(0),
        "input_leaves": (values.TensorSpec("float32", ("rows", 2)),),
        "output_structure": values.LeafRef(0),
    }
    return values.Variant(**{**fields, **changes})  # type: ignore[arg-type]


def model_message(**fields: object) -> model_pb2.Model:
    program = values.Program(torch_version="2", tensors=(), variants=(smallest_variant(),), operators={})
    message = codec.encode_model_spec(values.ModelSpec(program=program))
    message.MergeFrom(model_pb2.Model(**fields))  # type: ignore[arg-type]
    return message
