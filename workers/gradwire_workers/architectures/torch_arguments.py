"""What an argument of a torch.nn class may be: numbers and known words. Never a path, an element type or a device."""

from __future__ import annotations

import inspect
import math
from typing import Any

from gradwire_workers.architectures.refusals import wrong_value

_WORDS: dict[str, tuple[str, ...]] = {
    "padding": ("same", "valid"),
    "padding_mode": ("zeros", "reflect", "replicate", "circular"),
    "nonlinearity": ("tanh", "relu"),
    "activation": ("relu", "gelu"),
    "approximate": ("none", "tanh"),
    "mode": ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area"),
}
"""The words that arguments of these names take."""
_MAX_INTEGER = 2**31 - 1
_MAX_LAYERS = 1024
_MAX_ITEMS = 16


def check_argument(parameter: inspect.Parameter, value: Any, field: str) -> None:
    """Raise InvalidArgument OPTION_OUT_OF_RANGE for a value that the parameter must not have."""
    name = parameter.name
    if isinstance(value, str):
        words = _WORDS.get(name, ())
        if value not in words:
            raise wrong_value(field, f"one of {', '.join(map(repr, words))}" if words else "no text", value)
    elif isinstance(value, (list, tuple)):
        if len(value) > _MAX_ITEMS:
            raise wrong_value(field, f"at most {_MAX_ITEMS} numbers", value)
        for index, item in enumerate(value):
            _check_number(item, f"{field}[{index}]")
    elif isinstance(value, bool) or parameter.annotation is bool or isinstance(parameter.default, bool):
        takes = (
            parameter.annotation is bool or isinstance(parameter.default, bool) or "bool" in str(parameter.annotation)
        )
        if not isinstance(value, bool) or not takes:
            raise wrong_value(field, "a bool" if takes else "a number", value)
    elif value is not None:
        _check_number(value, field)
        if parameter.annotation is int and not isinstance(value, int):
            raise wrong_value(field, "an int", value)
        if name.endswith("_layers") and not 1 <= value <= _MAX_LAYERS:
            raise wrong_value(field, f"from 1 to {_MAX_LAYERS} layers", value)


def _check_number(value: Any, field: str) -> None:
    if isinstance(value, (list, tuple)) and len(value) <= _MAX_ITEMS:
        for index, item in enumerate(value):
            _check_number(item, f"{field}[{index}]")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise wrong_value(field, "a number", value)
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise wrong_value(field, f"an int of at most {_MAX_INTEGER}", value)
