"""A message between frontend and rank as frames: a small JSON header and raw buffers. No pickle, no protobuf, no torch.

A message is a dict of plain values: None, bool, int, float, str, bytes, TensorData, and lists, tuples and dicts (with
string keys) of them. Bytes-like values and tensor bytes become frames of their own, uncopied; a tensor in a segment
travels as the segment's name. Lists and tuples stay apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from gradwire_proto.values import Segment, TensorData

Frame: TypeAlias = "bytes | bytearray | memoryview"

to_json = json.JSONEncoder(separators=(",", ":")).encode
"""JSON without spaces. json.dumps would make an encoder each time."""

_raw_decode = json.JSONDecoder().raw_decode


def from_json(raw: Frame) -> Any:
    """The value of what `to_json` wrote. json.loads would look for other encodings, and for spaces."""
    return _raw_decode(str(raw, "utf-8"))[0]


class Encoded(NamedTuple):
    """A value of a message that its maker has encoded: `text` is its JSON, in which `frame_at(n)` is frame n, from 1.

    No other value of the message may have frames.
    """

    text: str
    frames: list[Frame]


def frame_at(index: int) -> str:
    """What stands for a frame in the text of an Encoded."""
    return f'{{"{_BYTES}":{index}}}'


# JSON has no word for these: each is an object with this one key.
_TENSOR, _SEGMENT, _BYTES, _TUPLE, _DICT = "$tensor", "$segment", "$bytes", "$tuple", "$dict"


def pack(message: Mapping[str, Any]) -> list[Frame]:
    """The frames of a message; frame 0 is the header. TypeError for a value that a message cannot hold."""
    frames: list[Frame] = [b""]
    encoded = [(key, value) for key, value in message.items() if type(value) is Encoded]
    if not encoded:
        frames[0] = to_json({key: _encode(value, frames) for key, value in message.items()}).encode()
        return frames
    ((name, done),) = encoded
    others = "".join(
        [f"{to_json(key)}:{to_json(_encode(value, frames))}," for key, value in message.items() if key != name]
    )
    assert len(frames) == 1, "what is encoded has all of the message's frames"
    return [f"{{{others}{to_json(name)}:{done.text}}}".encode(), *done.frames]


def unpack(frames: Sequence[Frame]) -> dict[str, Any]:
    """The message that `pack` made frames of. Bytes and tensors refer to the frames, uncopied."""
    header = from_json(frames[0])
    return {key: _decode(value, frames) for key, value in header.items()}


# Looked for before anything else: most of a message's values are of these.
_PLAIN = frozenset({type(None), bool, int, float, str})


def _encode(value: Any, frames: list[Frame]) -> Any:
    if type(value) in _PLAIN or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, TensorData):
        if isinstance(value.data, Segment):
            where = value.data
            return {_SEGMENT: [value.dtype, value.shape, where.path, where.offset, where.nbytes]}
        if isinstance(value.data, (bytes, bytearray, memoryview)):
            return {_TENSOR: [value.dtype, value.shape, _add(value.data, frames)]}
        raise TypeError(f"a message cannot hold a tensor whose bytes are a {type(value.data).__name__}")
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, frames) for item in value]}
    if isinstance(value, list):
        return [_encode(item, frames) for item in value]
    if isinstance(value, Mapping):
        encoded = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a message cannot hold the key {key!r}: keys are strings")
            encoded[key] = _encode(item, frames)
        # A dict that looks like one of the tags, or might, is wrapped.
        return {_DICT: encoded} if len(encoded) == 1 and next(iter(encoded)).startswith("$") else encoded
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_BYTES: _add(value, frames)}
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


def _add(data: Frame, frames: list[Frame]) -> int:
    if isinstance(data, memoryview) and (data.format != "B" or data.ndim != 1):
        # A view with a zero in its shape cannot be cast.
        data = data.cast("B") if data.nbytes else b""
    frames.append(data)
    return len(frames) - 1


def _decode(value: Any, frames: Sequence[Frame]) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [_decode(item, frames) for item in value]
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == _TENSOR:
            dtype, shape, index = content
            return TensorData(dtype, tuple(shape), frames[index])
        if tag == _SEGMENT:
            dtype, shape, path, offset, nbytes = content
            return TensorData(dtype, tuple(shape), Segment(path, offset, nbytes))
        if tag == _TUPLE:
            return tuple(_decode(item, frames) for item in content)
        if tag == _BYTES:
            return frames[content]
        if tag == _DICT:
            value = content
    return {key: _decode(item, frames) for key, item in value.items()}
