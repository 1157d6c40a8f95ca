"""Tensors and batches that the codec refuses: each by its field and the bound, never by a crash."""

from __future__ import annotations

import pytest
from proto.codec_messages import model_message, refusal, tensor

from gradwire_proto import codec, values
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import tensor_pb2

UNKNOWN_FIELD = bytes([0xF8, 0x3F, 0x01])  # Field number 1023, a varint of 1.


@pytest.mark.parametrize(
    ("message", "reason", "field"),
    [
        (tensor(data=bytes(7)), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(data=bytes(9)), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(shape=(0,), data=b"x"), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(shape=(2**40, 2**40), data=b""), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(dtype=0, data=bytes(8)), "ENUM_VALUE_UNKNOWN", "t.dtype"),
        (tensor(dtype=99, data=bytes(8)), "ENUM_VALUE_UNKNOWN", "t.dtype"),
        (tensor(shape=(-2,), data=bytes(8)), "SHAPE_INVALID", "t.shape"),
        (tensor(shape=(-1, -2), data=bytes(8)), "SHAPE_INVALID", "t.shape"),
        (tensor(shape=(0, 2**62, 2**62), data=b""), "SHAPE_INVALID", "t.shape"),
        (tensor(shape=(1,) * 65, data=bytes(4)), "SHAPE_INVALID", "t.shape"),
        (tensor(dtype=tensor_pb2.DTYPE_BOOL, data=b"\x01\x02"), "TENSOR_NOT_BOOL", "t"),
        (tensor(), "FIELD_MISSING", "t"),
        (tensor(handle="/etc/passwd"), "NAME_INVALID", "t"),
        (tensor(handle="uploads/../tensors/0"), "NAME_INVALID", "t"),
        (tensor(handle="uploads/a/tensors/-1"), "NAME_INVALID", "t"),
    ],
)
def test_tensor_that_contradicts_itself_is_refused(message: tensor_pb2.Tensor, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_tensor(message, "t"))
    assert isinstance(error, InvalidArgument)
    assert error.reason == reason
    assert error.field is not None and error.field.startswith(field)


def test_size_mismatch_names_both_sizes() -> None:
    error = refusal(lambda: codec.decode_tensor(tensor(shape=(2, 3), data=bytes(20)), "batch.inputs"))
    assert str(error) == "batch.inputs: float32[2, 3] has 24 bytes, got 20"


@pytest.mark.parametrize("content", [{"data": bytes(8)}, {"handle": "uploads/a/tensors/0"}])
def test_tensor_above_the_limit_is_refused_by_the_setting(content: dict) -> None:
    limits = values.Limits(tensor_bytes=7)
    error = refusal(lambda: codec.decode_tensor(tensor(**content), "t", limits))
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.field) == ("TENSOR_TOO_LARGE", "t")
    assert "tensor_bytes" in str(error) and "7" in str(error)


def test_tensor_without_elements_may_leave_out_its_data() -> None:
    assert codec.decode_tensor(tensor(shape=(0, 3))) == values.TensorData("float32", (0, 3), b"")


def test_path_leads_to_the_leaf_at_fault() -> None:
    good = values.TensorData("float32", (1,), bytes(4))
    message = codec.encode_batch(values.Batch({"x": (good, [good])}, good))
    message.inputs.dict.entries[0].value.tuple.items[1].list.items[0].tensor.data = b""
    assert refusal(lambda: codec.decode_batch(message)).field == "batch.inputs.x[1][0]"


def test_batch_without_inputs_is_refused() -> None:
    error = refusal(lambda: codec.decode_batch(tensor_pb2.Batch()))
    assert (error.field, error.reason) == ("batch.inputs", "FIELD_MISSING")


def test_name_or_key_that_stands_twice_is_refused() -> None:
    named = [tensor_pb2.NamedTensor(name="w", tensor=tensor(data=bytes(8)))] * 2
    error = refusal(lambda: codec.decode_named_tensors(named))
    assert (error.field, error.reason) == ('tensors["w"]', "DUPLICATE_NAME")
    value = tensor_pb2.Value()
    for _ in range(2):
        value.dict.entries.add(key="k").value.integer = 1
    assert refusal(lambda: codec.decode_value(value)).reason == "DUPLICATE_NAME"


def test_nameless_tensor_is_refused_by_its_index() -> None:
    error = refusal(lambda: codec.decode_named_tensors([tensor_pb2.NamedTensor()]))
    assert (error.field, error.reason) == ("tensors[0].name", "NAME_MISSING")


def test_nesting_is_bounded_both_ways_and_the_bound_passes_the_parser() -> None:
    value: values.Value = 1
    for _ in range(codec.MAX_DEPTH):
        value = {"k": value}
    request = pb.TrainStepRequest()
    codec.encode_value(value, request.batch.inputs)
    assert codec.decode_batch(pb.TrainStepRequest.FromString(request.SerializeToString()).batch).inputs == value
    assert refusal(lambda: codec.encode_value([value])).reason == "NESTING_TOO_DEEP"
    deeper = tensor_pb2.Value()
    codec.encode_value(value, deeper.list.items.add())
    assert refusal(lambda: codec.decode_value(deeper)).reason == "NESTING_TOO_DEEP"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"x": [object()]}, "VALUE_TYPE_UNSUPPORTED"),
        ({"x": [2**63]}, "INTEGER_OUT_OF_RANGE"),
        ({"x": ["\ud800"]}, "TEXT_NOT_UTF8"),
    ],
)
def test_value_that_cannot_travel_is_refused_by_its_path(value: dict, reason: str) -> None:
    error = refusal(lambda: codec.encode_value(value, field="v"))
    assert (error.field, error.reason) == ("v.x[0]", reason)


def test_key_that_is_no_string_is_refused() -> None:
    assert refusal(lambda: codec.encode_value({1: 2})).reason == "VALUE_TYPE_UNSUPPORTED"  # type: ignore[dict-item]


def test_field_that_a_newer_client_sends_is_refused_and_its_place_told() -> None:
    request = pb.TrainStepRequest.FromString(UNKNOWN_FIELD)
    error = refusal(lambda: codec.refuse_unknown_fields(request))
    assert (error.reason, error.field) == ("UNKNOWN_FIELD", None)
    assert "TrainStepRequest has no field number 1023" in str(error)
    model = model_message()
    model.program.graphs.variants[0].graph.nodes.add().MergeFromString(UNKNOWN_FIELD)
    error = refusal(lambda: codec.refuse_unknown_fields(model, "model"))
    assert (error.reason, error.field) == ("UNKNOWN_FIELD", "model.program.graphs.variants[0].graph.nodes[0]")
    codec.refuse_unknown_fields(model_message(labels={"a": "b"}))


def test_field_that_a_newer_client_sends_is_found_in_any_item_of_a_list() -> None:
    good = values.TensorData("float32", (1,), bytes(4))
    request = pb.TrainStepRequest(batch=codec.encode_batch(values.Batch({"x": (good, [good, good])}, good)))
    codec.refuse_unknown_fields(request)
    leaf = request.batch.inputs.dict.entries[0].value.tuple.items[1].list.items[1]
    leaf.MergeFromString(UNKNOWN_FIELD)
    error = refusal(lambda: codec.refuse_unknown_fields(request))
    assert (error.reason, error.field) == (
        "UNKNOWN_FIELD",
        "batch.inputs.dict.entries[0].value.tuple.items[1].list.items[1]",
    )
