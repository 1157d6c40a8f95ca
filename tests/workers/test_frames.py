"""Messages between frontend and rank survive the trip, uncopied."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_proto.values import Segment, TensorData
from gradwire_workers.frames import Encoded, frame_at, pack, unpack

TENSORS = st.builds(lambda data: TensorData("uint8", (len(data),), data), st.binary(max_size=64))
SEGMENTS = st.builds(
    lambda offset, size: TensorData("int8", (size,), Segment("/dev/shm/x/rank-1", offset, size)),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
CONSTANTS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
# Keys that look like the encoding's own are the interesting ones.
KEYS = st.sampled_from(["$tensor", "$tuple", "$dict", "$bytes", "$segment", "$"]) | st.text()
MESSAGES = st.dictionaries(
    KEYS,
    st.recursive(
        CONSTANTS | TENSORS | SEGMENTS | st.binary(max_size=16),
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
        max_leaves=12,
    ),
)


@given(MESSAGES)
def test_a_message_comes_back_as_it_was(message):
    assert unpack(pack(message)) == message


def test_numbers_that_are_not_finite_survive():
    back = unpack(pack({"nan": math.nan, "inf": [math.inf, -math.inf]}))
    assert math.isnan(back["nan"])
    assert back["inf"] == [math.inf, -math.inf]


def test_tensor_bytes_are_frames_of_their_own_and_never_copied():
    data = bytearray(b"\x01" * 1000)
    frames = pack({"tensor": TensorData("float32", (10, 25), memoryview(data))})
    assert len(frames) == 2
    data[0] = 7
    assert frames[1][0] == 7
    assert unpack(frames)["tensor"].data[0] == 7


def test_views_of_any_format_become_bytes():
    view = memoryview(bytes(range(16))).cast("f", (2, 2))
    empty = memoryview(b"").cast("f")
    frames = pack({"view": view, "empty": empty})
    assert [bytes(frame) for frame in frames[1:]] == [bytes(range(16)), b""]


def test_the_header_is_json_that_anyone_can_read():
    header = json.loads(pack({"kind": "train_step", "lr": 0.1})[0])
    assert header == {"kind": "train_step", "lr": 0.1}


@pytest.mark.parametrize("value", [object(), {1: "a"}, {"a": {2}}, 1j])
def test_what_a_message_cannot_hold_is_refused(value):
    with pytest.raises(TypeError, match="a message cannot hold"):
        pack({"value": value})


def test_a_value_that_is_encoded_already_comes_back_as_one_that_is_not():
    encoded = Encoded(f'{{"data":[{frame_at(1)},{frame_at(2)}],"rate":0.5}}', [b"ab", memoryview(b"c")])
    assert unpack(pack({"call": 7, "kind": "x", "fields": encoded})) == {
        "call": 7,
        "kind": "x",
        "fields": {"data": [b"ab", b"c"], "rate": 0.5},
    }
