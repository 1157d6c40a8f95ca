"""Nested values as JSON: exact, and readable."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.storage.checkpoint_cases import plain

from gradwire_proto.values import TensorData
from gradwire_server.storage.nested_values import decode_nested, encode_nested

TEXTS = st.text(st.characters(codec="utf-8"), max_size=5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=True, allow_infinity=True)
    | TEXTS
    | st.binary(min_size=4, max_size=4).map(lambda data: TensorData("float32", (), data))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=12,
)


def round_trip(value: Any) -> Any:
    text, tensors = encode_nested(value)
    return decode_nested(text, tensors)


@given(VALUES)
def test_every_value_comes_back_with_its_types_and_bits(value):
    assert plain(round_trip(value)) == plain(value)


@pytest.mark.parametrize("number", [-0.0, 5e-324, 1.7976931348623157e308, 0.1, 1e22, 1.0, math.inf, -math.inf])
def test_floats_keep_their_bits(number):
    assert struct.pack(">d", round_trip(number)) == struct.pack(">d", number)


def test_nan_keeps_its_sign_and_payload():
    bits = bytes.fromhex("fff8000000000123")
    assert struct.pack(">d", round_trip(struct.unpack(">d", bits)[0])) == bits


def test_tensors_are_named_by_where_they_are():
    tensor = TensorData("float32", (), bytes(4))
    _, tensors = encode_nested({"state": {"0.weight": {"exp_avg": tensor, "history": [tensor]}}})
    assert list(tensors) == ["state.0.weight.exp_avg", "state.0.weight.history[0]"]


def test_paths_that_read_alike_are_two_tensors():
    one, two = (TensorData("uint8", (1,), bytes([number])) for number in (1, 2))
    value = {"a.b": one, "a": {"b": two}}
    assert plain(round_trip(value)) == plain(value)


@pytest.mark.parametrize("value", [{1: 2}, {1, 2}, b"bytes", 1j, [object()]])
def test_what_is_no_value_is_an_error(value):
    with pytest.raises(TypeError):
        encode_nested(value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"NaN",
        b"[Infinity]",
        b"\xff",
        b"{}",
        json.dumps({"tensor": "b"}).encode(),
        json.dumps({"tensor": 3}).encode(),
        json.dumps({"float": "7ff8"}).encode(),
        json.dumps({"float": "x" * 16}).encode(),
        json.dumps({"tuple": 3}).encode(),
        json.dumps({"dict": {}, "tuple": []}).encode(),
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_text_that_stands_for_nothing_is_refused(text):
    with pytest.raises(ValueError):
        decode_nested(text, {"a": TensorData("float32", (), bytes(4))})
