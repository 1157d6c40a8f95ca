"""What users pass: tensors, NumPy arrays and constants in tuples, lists and dicts -> values of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import (
    ITEM_SIZE,
    ConstantSpec,
    Leaf,
    LeafRef,
    Structure,
    TensorSpec,
    Value,
    leaves,
    unflatten,
)


def normalize(value: Any, field: str = "batch") -> Value:
    """The same nesting with detached torch tensors (NumPy arrays become tensors) and plain constants at its leaves.

    Raises InvalidArgument with the leaf's path: a type that has no place in a batch, a key that is no string, a sparse
    or quantised tensor, an element type that the service does not speak.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _tensor(value, field)
    if isinstance(value, np.generic):
        return _constant(value.item(), field)
    if isinstance(value, tuple):
        return tuple(normalize(item, f"{field}[{index}]") for index, item in enumerate(value))
    if isinstance(value, list):
        return [normalize(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, field): normalize(item, f"{field}.{key}") for key, item in value.items()}
    return _constant(value, field)


def _tensor(value: torch.Tensor | np.ndarray, field: str) -> Any:
    if isinstance(value, np.ndarray):
        value = _from_numpy(value, field)
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise InvalidArgument(f"expected a dense tensor, got {value.layout}", field=field, reason="LAYOUT_UNSUPPORTED")
    if dtype_name(value.dtype) not in ITEM_SIZE:
        raise InvalidArgument(
            f"expected one of {', '.join(ITEM_SIZE)}; got {value.dtype}", field=field, reason="DTYPE_UNSUPPORTED"
        )
    return value.detach()


def _from_numpy(array: np.ndarray, field: str) -> torch.Tensor:
    """The array's own memory where torch can use it; a copy of another order or byte order, misaligned or read-only."""
    if array.dtype.name not in ITEM_SIZE:
        raise InvalidArgument(
            f"expected one of {', '.join(ITEM_SIZE)}; got {array.dtype.name}", field=field, reason="DTYPE_UNSUPPORTED"
        )
    native = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    # To numpy one row is contiguous whatever its stride; to torch it is not.
    odd = any(stride < 0 or stride % native.itemsize for stride in native.strides)
    # numpy calls complex128 aligned at 8 bytes; torch's kernels need 16.
    odd = odd or native.ctypes.data % native.itemsize != 0
    return torch.from_numpy(native if native.flags.behaved and not odd else native.copy())


def _constant(value: Any, field: str) -> Value:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidArgument(
        f"expected tensors, NumPy arrays and constants in tuples, lists and dicts; got a {type(value).__qualname__}",
        field=field,
        reason="VALUE_UNSUPPORTED",
    )


def _key(key: Any, field: str) -> str:
    if isinstance(key, str):
        return key
    raise InvalidArgument(f"expected string keys, got {key!r}", field=field, reason="VALUE_UNSUPPORTED")


def flatten(value: Value) -> tuple[Structure, list[Any]]:
    """(how it is nested, its leaves in order). None is structure, no leaf."""
    return _structure(value, []), [leaf for _, leaf in leaves(value)]


def _structure(value: Any, seen: list[None]) -> Structure:
    if isinstance(value, tuple):
        return tuple(_structure(item, seen) for item in value)
    if isinstance(value, list):
        return [_structure(item, seen) for item in value]
    if isinstance(value, dict):
        return {key: _structure(item, seen) for key, item in value.items()}
    if value is None:
        return None
    seen.append(None)
    return LeafRef(len(seen) - 1)


def as_call(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of a module for a batch's inputs: a tuple, a dict, or one argument."""
    if isinstance(value, tuple):
        return value, {}
    if isinstance(value, dict):
        return (), value
    return (value,), {}


def call_with(function: Any, structure: Structure, flat: list[Any]) -> Any:
    """Call a module with its inputs given flat."""
    positional, keyword = as_call(unflatten(structure, flat))
    return function(*positional, **keyword)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def leaf_spec(leaf: Any, symbols: Mapping[int, str]) -> Leaf:
    """What a batch must bring in place of this leaf. symbols: those of the dimensions that vary."""
    if isinstance(leaf, torch.Tensor):
        shape = tuple(symbols.get(dimension, size) for dimension, size in enumerate(leaf.shape))
        return TensorSpec(dtype_name(leaf.dtype), shape)
    return ConstantSpec(leaf)
