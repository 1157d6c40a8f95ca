"""Programs that the codec refuses: each by its field and the bound, never by a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from proto.codec_messages import FLOAT32, INT64, refusal, smallest_variant, tensor

from gradwire_proto import codec, values
from gradwire_proto.v1 import model_pb2, program_pb2, tensor_pb2


@pytest.mark.parametrize(
    ("decode", "empty"),
    [
        (codec.decode_value, tensor_pb2.Value()),
        (codec.decode_argument, program_pb2.Argument()),
        (codec.decode_structure, program_pb2.Structure()),
        (codec.decode_leaf, program_pb2.Leaf()),
        (codec.decode_graph_input, program_pb2.GraphInput()),
        (codec.decode_program, program_pb2.Program()),
        (codec.decode_program, program_pb2.Program(graphs=program_pb2.GraphProgram(torch_version="2"))),
        (codec.decode_variant, program_pb2.Variant(name="v")),
        (codec.decode_loss, model_pb2.Loss()),
        (codec.decode_model_spec, model_pb2.Model()),
    ],
)
def test_message_that_says_nothing_is_refused(decode: Callable, empty: object) -> None:
    error = refusal(lambda: decode(empty, "it"))
    assert error.reason == "FIELD_MISSING"
    assert error.field is not None and error.field.startswith("it")


@pytest.mark.parametrize("kind", ["dtype", "layout", "memory_format"])
@pytest.mark.parametrize("number", [0, 77])
def test_argument_of_an_unknown_enum_value_is_refused(kind: str, number: int) -> None:
    message = program_pb2.Argument(**{kind: number})  # type: ignore[arg-type]
    assert refusal(lambda: codec.decode_argument(message)).reason == "ENUM_VALUE_UNKNOWN"


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"role": 0}, "ENUM_VALUE_UNKNOWN", "tensor.role"),
        ({"name": ""}, "NAME_MISSING", "tensor.name"),
        (
            {"role": program_pb2.TENSOR_ROLE_BUFFER, "requires_grad": True},
            "GRADIENT_NOT_POSSIBLE",
            "tensor.requires_grad",
        ),
        ({"dtype": INT64, "requires_grad": True}, "GRADIENT_NOT_POSSIBLE", "tensor.requires_grad"),
        ({"shape": [-1]}, "SHAPE_INVALID", "tensor.shape"),
    ],
)
def test_state_tensor_that_cannot_be_is_refused(fields: dict, reason: str, field: str) -> None:
    good = {"name": "w", "role": program_pb2.TENSOR_ROLE_PARAMETER, "dtype": FLOAT32, "shape": [2]}
    error = refusal(lambda: codec.decode_state_tensor(program_pb2.StateTensor(**{**good, **fields})))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize("symbol", [{"min": -1}, {"min": 3, "max": 2}, {"max": -1}])
def test_symbol_with_impossible_bounds_is_refused(symbol: dict) -> None:
    message = program_pb2.Symbol(name="rows", **symbol)
    assert refusal(lambda: codec.decode_symbol(message)).reason == "INTEGER_OUT_OF_RANGE"


def test_bound_of_zero_is_refused_because_the_wire_reads_it_as_none() -> None:
    assert refusal(lambda: codec.encode_symbol(values.Symbol("rows", 0, 0))).reason == "INTEGER_OUT_OF_RANGE"


@pytest.mark.parametrize("structure", [(), values.LeafRef(1), (values.LeafRef(0), values.LeafRef(0))])
def test_structure_that_misses_or_repeats_a_leaf_is_refused(structure: values.Structure) -> None:
    message = codec.encode_variant(smallest_variant(input_structure=structure))
    error = refusal(lambda: codec.decode_variant(message))
    assert (error.reason, error.field) == ("STRUCTURE_INVALID", "variant.input_structure")


def test_leaf_that_is_a_constant_tensor_is_refused() -> None:
    message = program_pb2.Leaf(constant=tensor_pb2.Value(tensor=tensor(data=bytes(8))))
    assert refusal(lambda: codec.decode_leaf(message)).reason == "VALUE_TYPE_UNSUPPORTED"
