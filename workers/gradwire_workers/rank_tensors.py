"""Tensors of a rank's commands and answers: bytes in messages and segments, torch's own in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.tensors import from_torch, to_torch, torch_dtype
from gradwire_proto.values import TensorData, leaves, map_leaves
from gradwire_workers.device_copies import on_host
from gradwire_workers.segments import INLINE_BYTES, SegmentWriter
from gradwire_workers.shard import Shard

# Bytes: what torch's allocator on the CPU aligns to.
_ALIGNMENT = 64

_SMALL = 64 << 10
"""Bytes below which a copy costs less than to look whether it can be done without."""

_SENDABLE = frozenset({type(None), bool, int, float, str, bytes, TensorData})


def shard_in(fields: Mapping[str, Any]) -> Shard:
    """The command's shard."""
    shard = fields["shard"]
    return Shard(**{**shard, "inputs": leaves_in(shard["inputs"]), "targets": leaves_in(shard["targets"])})


def leaves_in(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of which some are tensors."""
    return tuple([_leaf(value) if isinstance(value, TensorData) else value for value in values])


def incoming(tensors: Mapping[str, TensorData], *, writable: bool = False) -> dict[str, torch.Tensor]:
    """Tensors by name. Views of the message where they can be, unless `writable`."""
    return {name: owned(tensor) if writable else _aligned(to_torch(tensor)) for name, tensor in tensors.items()}


def _leaf(value: TensorData) -> torch.Tensor:
    nbytes, data = value.nbytes, value.data
    if not 0 < nbytes < _SMALL or value.dtype == "bool" or not isinstance(data, (bytes, bytearray, memoryview)):
        return _aligned(to_torch(value))
    view = memoryview(data).cast("B")
    if len(view) != nbytes:
        return to_torch(value)  # which says so
    raw = torch.empty(nbytes, dtype=torch.uint8)
    raw.numpy().data[:] = view
    return raw.view(torch_dtype(value.dtype)).view(value.shape)


def owned(value: TensorData) -> torch.Tensor:
    """A tensor with memory of its own, as torch allocates it: the bytes are copied once, from wherever they are."""
    view = to_torch(value)
    return torch.empty_like(view).copy_(view)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address like those that torch gives its own.

    Libraries may compute other bits where memory begins elsewhere, and a message's does so by chance: a command that is
    carried out again must give what it gave.
    """
    if tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


def outgoing(answer: Mapping[str, Any], segments: SegmentWriter) -> Mapping[str, Any]:
    """The answer with its tensors as bytes: in the message, or in a segment when they are big.

    InvalidArgument (OUTPUT_UNSUPPORTED, DTYPE_UNSUPPORTED, TENSOR_NOT_DENSE) for what no message can hold.
    """
    found: list[torch.Tensor] = []
    if not _find_tensors(answer, found):
        _refuse(answer)
    if not found:
        return answer
    encoded = (from_torch(tensor) for tensor in on_host(found))
    if sum(tensor.nbytes for tensor in found) >= INLINE_BYTES:
        encoded = iter(segments.write(encoded, [tensor.nbytes for tensor in found]))
    return map_leaves(lambda leaf: next(encoded) if isinstance(leaf, torch.Tensor) else leaf, dict(answer))


def _find_tensors(value: Any, found: list[torch.Tensor]) -> bool:
    """Appends the tensors in a nested value, depth first. Whether nothing is in it that no message can hold."""
    if type(value) in _SENDABLE:
        return True
    if isinstance(value, torch.Tensor):
        found.append(value)
        return True
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return all(_find_tensors(item, found) for item in value)
    return isinstance(value, (bool, int, float, str, bytes))


def _refuse(answer: Mapping[str, Any]) -> NoReturn:
    for path, leaf in leaves(answer):
        if not _find_tensors(leaf, []):
            raise InvalidArgument(
                f"{path}: the program gives a {type(leaf).__qualname__}, which cannot be sent",
                field="batch",
                reason="OUTPUT_UNSUPPORTED",
            )
    raise AssertionError("something was found that cannot be sent")
