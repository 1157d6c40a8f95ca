"""Steps as bytes: lists of messages that are not parsed, batches without their bytes, and requests cut into parts."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_proto import codec
from gradwire_proto.batch_form import BatchForm, form_of
from gradwire_proto.encoding.repeated_bytes import join_items, split_items
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.step_template import template_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, Handle, TensorData


def tensor(shape: tuple[int, ...] = (4, 2), dtype: str = "float32", fill: int = 0) -> TensorData:
    plain = TensorData(dtype, shape, b"")
    return TensorData(dtype, shape, bytes((fill + each) % 251 for each in range(plain.nbytes)))


def request(batch: Batch, request_id: str = "", **fields) -> pb.TrainStepRequest:
    made = pb.TrainStepRequest(name="models/m", request_id=request_id or str(uuid.uuid4()), **fields)
    codec.encode_batch(batch, made.batch)
    return made


@given(st.lists(st.binary(max_size=40_000), max_size=6))
@settings(max_examples=40, deadline=None)
def test_items_are_split_and_joined_as_protobuf_does(items):
    assert split_items(join_items(items)) == items


def test_steps_in_a_message_are_their_bytes():
    steps = [request(Batch(tensor(fill=each), tensor((4,), "int64"))) for each in range(3)]
    raw = pb.TrainStepsRequest(steps=steps).SerializeToString()
    assert split_items(raw) == [step.SerializeToString() for step in steps]
    assert pb.TrainStepsRequest.FromString(join_items(split_items(raw))) == pb.TrainStepsRequest(steps=steps)
    with pytest.raises(InvalidArgument) as caught:
        split_items(raw + b"\x18\x01")
    assert caught.value.reason == "UNKNOWN_FIELD"


NESTED = Batch({"a": (tensor(), 3, None), "b": [tensor((8, 3), "int64", 5)], "c": True}, tensor((4,), "float64", 7))


def test_a_form_and_bytes_make_the_batch():
    found = form_of(NESTED)
    assert found is not None
    key, data = found
    assert BatchForm(NESTED).batch(data) == NESTED
    other = Batch({"a": (tensor(fill=9), 3, None), "b": [tensor((8, 3), "int64")], "c": True}, tensor((4,), "float64"))
    again = form_of(other)
    assert again is not None and again[0] == key
    assert BatchForm(NESTED).batch(again[1]) == other


@pytest.mark.parametrize(
    "other",
    [
        Batch({"a": (tensor(), 3.0, None), "b": [tensor((8, 3), "int64", 5)], "c": True}, tensor((4,), "float64", 7)),
        Batch({"a": (tensor(), 3, None), "b": [tensor((8, 3), "int64", 5)], "c": 1}, tensor((4,), "float64", 7)),
        Batch({"a": (tensor(), 3, None), "b": (tensor((8, 3), "int64", 5),), "c": True}, tensor((4,), "float64", 7)),
        Batch({"b": [tensor((8, 3), "int64", 5)], "a": (tensor(), 3, None), "c": True}, tensor((4,), "float64", 7)),
        Batch({"a": (tensor((2, 4)), 3, None), "b": [tensor((8, 3), "int64", 5)], "c": True}, tensor((4,), "float64")),
        Batch({"a": (tensor(), 3, None), "b": [tensor((8, 3), "int64", 5)], "c": True}),
    ],
)
def test_batches_that_differ_in_more_than_bytes_have_other_forms(other):
    first, second = form_of(NESTED), form_of(other)
    assert first is not None and second is not None and first[0] != second[0]


def test_tensors_elsewhere_have_no_form():
    handle = TensorData("float32", (4,), Handle("uploads/00000000000000000000000000000000/tensors/0"))
    assert form_of(Batch((tensor(), handle))) is None


@pytest.mark.parametrize("batch", [NESTED, Batch(tensor()), Batch(tensor((300, 40)), tensor((300,), "int64"))])
@pytest.mark.parametrize("fields", [{}, {"learning_rate": 0.1}])
def test_a_template_fills_and_matches_what_a_message_would(batch, fields):
    first = request(batch, **fields)
    template = template_of(first, first.SerializeToString())
    assert template is not None
    found = form_of(batch)
    assert found is not None
    data = [bytes(reversed(each)) for each in found[1]]
    request_id = str(uuid.uuid4())
    wanted = request(BatchForm(batch).batch(data), request_id, **fields).SerializeToString()
    assert template.fill(data, request_id) == wanted
    assert len(wanted) == template.size
    parts = template.match(wanted)
    assert parts is not None and [bytes(each) for each in parts[0]] == data and parts[1] == request_id


def test_a_template_matches_nothing_that_differs_elsewhere():
    first = request(NESTED)
    raw = first.SerializeToString()
    template = template_of(first, raw)
    assert template is not None
    cut = template.match(raw)
    assert cut is not None
    variable = sum(len(each) for each in cut[0]) + 36
    refused = 0
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 0xFF
        refused += template.match(bytes(changed)) is None
    # Ids that are none do not match either.
    assert refused == len(raw) - variable + 36
    assert template.match(raw + b"\0") is None


@pytest.mark.parametrize(
    "batch",
    [
        Batch(tensor((4,), "bool")),
        Batch(tensor((40,), "bool"), tensor()),
        Batch(tensor((3,), "float32")),
        Batch(TensorData("float32", (64,), Handle("uploads/00000000000000000000000000000000/tensors/0"))),
    ],
)
def test_what_has_to_be_looked_at_has_no_template(batch):
    assert template_of(request(batch)) is None


def test_what_is_written_another_way_has_no_template():
    first = request(NESTED)
    assert (
        template_of(first, pb.TrainStepRequest(name="models/m").SerializeToString() + first.SerializeToString()) is None
    )
    assert template_of(request(NESTED, request_id="short")) is None
