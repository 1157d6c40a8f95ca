"""Nested values as JSON beside a file of tensors: the optimizer's state, exact to the bit, and readable.

None, bools, whole numbers, texts, lists    as in JSON
finite numbers                              as in JSON, always with a point or an exponent: 1.0 is not 1
NaN and infinities                          {"float": "7ff8000000000000"}, their bits
a tuple                                     {"tuple": [...]}
a dict                                      {"dict": {...}}
a tensor                                    {"tensor": "state.0.weight.exp_avg"}, its name in the file
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from gradwire_proto.values import NamedTensors, TensorData, Value


def encode_nested(value: Value) -> tuple[bytes, NamedTensors]:
    """(JSON, the tensors that it names). Raises TypeError for what is no Value."""
    tensors: NamedTensors = {}
    plain = _plain(value, "", tensors)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=1).encode(), tensors


def decode_nested(text: bytes, tensors: NamedTensors) -> Value:
    """The value. Raises ValueError where the text is not what `encode_nested` writes with these tensors."""
    try:
        return _nested(json.loads(text, parse_constant=_refuse_constant), tensors)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _plain(value: Any, path: str, tensors: NamedTensors) -> Any:
    if isinstance(value, TensorData):
        name = path or "value"
        while name in tensors:
            # Two paths can read alike: {"a.b": ...} and {"a": {"b": ...}}.
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if type(value) in (list, tuple):
        items = [_plain(item, f"{path}[{index}]", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _plain(item, f"{path}.{key}" if path else key, tensors) for key, item in value.items()}}
    raise TypeError(f"{path or 'the value'} is a {type(value).__qualname__}, or has keys that are no texts")


def _nested(plain: Any, tensors: NamedTensors) -> Any:
    if isinstance(plain, list):
        return [_nested(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    match plain:
        case {"dict": dict(entries), **rest} if not rest:
            return {key: _nested(item, tensors) for key, item in entries.items()}
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_nested(item, tensors) for item in items)
        case {"tensor": str(name), **rest} if not rest and name in tensors:
            return tensors[name]
        case {"float": str(bits), **rest} if not rest and len(bits) == 16:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
    raise ValueError(f"it has {str(plain)[:80]}, which stands for nothing")


def _refuse_constant(word: str) -> None:
    raise ValueError(f"it has the word {word}")
