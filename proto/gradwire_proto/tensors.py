"""Tensors of torch and arrays of numpy to TensorData and back, copied only where they must be."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import ITEM_SIZE, Handle, Segment, TensorData, Value, map_leaves

_TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_SIZE}
_DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _TORCH_DTYPES.items()}

_SMALL = 64 << 10
"""Bytes below which a copy costs less than a view of read-only memory."""


def torch_dtype(name: str) -> torch.dtype:
    """torch.float32 of "float32"."""
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype, field: str | None = None) -> str:
    """ "float32" of torch.float32. Types that the service does not speak are refused."""
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        raise _unsupported(str(dtype).removeprefix("torch."), field)
    return name


def from_torch(tensor: torch.Tensor, field: str | None = None) -> TensorData:
    """The tensor's bytes: a view of its memory where it is dense, contiguous and on the CPU, otherwise a copy.

    A view shows later changes of the tensor; encode it before the tensor changes.
    """
    dtype = dtype_name(tensor.dtype, field)
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise InvalidArgument(
            f"expected a dense tensor with data, got a {kind} one", field=field, reason="TENSOR_NOT_DENSE"
        )
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # as_strided, not view(-1): a single element counts as contiguous whatever its stride, and view keeps the stride.
    flat = dense.as_strided((dense.numel(),), (1,))
    return TensorData(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def from_any(value: Any, field: str | None = None) -> TensorData:
    """The bytes of a torch tensor, a numpy array or a numpy scalar."""
    if isinstance(value, torch.Tensor):
        return from_torch(value, field)
    if isinstance(value, TensorData):
        return value
    if not isinstance(value, (np.ndarray, np.generic)):
        raise InvalidArgument(
            f"expected a tensor or a numpy array, got {type(value).__qualname__}", field=field, reason="TENSOR_EXPECTED"
        )
    array = np.asarray(value, order="C")
    if array.dtype.name not in ITEM_SIZE:
        raise _unsupported(array.dtype.name, field)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return TensorData(array.dtype.name, array.shape, array.reshape(-1).view(np.uint8).data)


def from_nested(value: Any, field: str = "value") -> Value:
    """The same nesting with tensors and numpy arrays as TensorData; constants stay. Other types are refused by path."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic, TensorData)):
        return from_any(value, field)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return tuple(from_nested(item, f"{field}[{index}]") for index, item in enumerate(value))
    if isinstance(value, list):
        return [from_nested(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: from_nested(item, f"{field}.{key}") for key, item in value.items()}
    raise InvalidArgument(
        f"expected tensors, arrays, tuples, lists, dicts and constants, got {type(value).__qualname__}",
        field=field,
        reason="VALUE_TYPE_UNSUPPORTED",
    )


def to_nested(value: Value, *, writable: bool = False) -> Any:
    """The same nesting with torch tensors."""
    return map_leaves(lambda leaf: to_torch(leaf, writable=writable) if isinstance(leaf, TensorData) else leaf, value)


def to_torch(value: TensorData, *, writable: bool = False) -> torch.Tensor:
    """A CPU tensor of these bytes.

    Without `writable` it may share memory with `value.data`, and nobody may write to it. With it, it is a copy.
    Raises InvalidArgument where the bytes are not those of the dtype and shape.
    """
    dtype = _TORCH_DTYPES[value.dtype]
    buffer = _buffer(value.data, writable)
    if buffer.nbytes != value.nbytes:
        raise InvalidArgument(
            f"{value.dtype}{list(value.shape)} has {value.nbytes} bytes, got {buffer.nbytes}",
            reason="TENSOR_SIZE_MISMATCH",
        )
    if not buffer.nbytes:
        return torch.empty(value.shape, dtype=dtype)
    # A bool of another byte than 0 and 1 is undefined behaviour inside torch.
    if dtype is torch.bool and int(torch.frombuffer(buffer, dtype=torch.uint8).max()) > 1:
        raise InvalidArgument("expected bool elements of 0 or 1", reason="TENSOR_NOT_BOOL")
    raw = torch.frombuffer(buffer, dtype=torch.uint8)
    # Kernels may load aligned, and a slice of a message need not be: then bytes are copied, for no kernel is to see
    # such elements (a copy of complex128 would end the process).
    if raw.data_ptr() % ITEM_SIZE[value.dtype]:
        raw = torch.empty(buffer.nbytes, dtype=torch.uint8).copy_(raw)
    return raw.view(dtype).view(value.shape)


def _buffer(data: Any, writable: bool) -> memoryview:
    """Memory that torch takes without a warning that it is read-only."""
    if isinstance(data, Handle):
        raise TypeError(f"{data.name} is the name of a tensor, not its bytes: download it first")
    if isinstance(data, Segment):
        return _read(data) if writable else _map(data)
    view = memoryview(data).cast("B")
    if writable or (view.readonly and view.nbytes <= _SMALL):
        return memoryview(bytearray(view))
    return np.asarray(_WritableView(view)).data if view.readonly else view


class _WritableView:
    """Read-only memory, declared writable. torch has no read-only tensors and warns, once, about what they could do."""

    def __init__(self, view: memoryview) -> None:
        self._keep_alive = view
        address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (view.nbytes,), "data": (address, False)}


def _read(segment: Segment) -> memoryview:
    buffer = memoryview(bytearray(segment.nbytes))
    with open(segment.path, "rb", buffering=0) as file:
        file.seek(segment.offset)
        filled = 0
        # One read returns at most 2 GiB.
        while filled < segment.nbytes and (count := file.readinto(buffer[filled:])):
            filled += count
    return buffer[:filled]


def _map(segment: Segment) -> memoryview:
    if not segment.nbytes:
        return memoryview(b"")
    start = segment.offset - segment.offset % mmap.ALLOCATIONGRANULARITY
    length = segment.offset - start + segment.nbytes
    with open(segment.path, "rb", buffering=0) as file:
        # Copy on write: whoever writes in spite of the promise changes nobody else's bytes.
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    return memoryview(mapped)[segment.offset - start :]


def _unsupported(name: str, field: str | None) -> InvalidArgument:
    return InvalidArgument(
        f"expected one of {', '.join(ITEM_SIZE)}; got {name}", field=field, reason="DTYPE_UNSUPPORTED"
    )
