"""Tensors of a rank's commands and answers: bytes in messages and segments, torch's own in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.values import TensorData, leaves, map_leaves
from gradwire_workers.segments import INLINE_BYTES, SegmentWriter
from gradwire_workers.shard import Shard

_SENDABLE = (type(None), bool, int, float, str, bytes, TensorData)


def shard_in(fields: Mapping[str, Any]) -> Shard:
    """The command's shard."""
    shard = fields["shard"]
    return Shard(**{**shard, "inputs": leaves_in(shard["inputs"]), "targets": leaves_in(shard["targets"])})


def leaves_in(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of which some are tensors."""
    return tuple(to_torch(value) if isinstance(value, TensorData) else value for value in values)


def incoming(tensors: Mapping[str, TensorData], *, writable: bool = False) -> dict[str, torch.Tensor]:
    """Tensors by name. Views of the message where they can be, unless `writable`."""
    return {name: to_torch(tensor, writable=writable) for name, tensor in tensors.items()}


def outgoing(answer: Mapping[str, Any], segments: SegmentWriter) -> Mapping[str, Any]:
    """The answer with its tensors as bytes: in the message, or in a segment when they are big.

    InvalidArgument (OUTPUT_UNSUPPORTED, DTYPE_UNSUPPORTED, TENSOR_NOT_DENSE) for what no message can hold.
    """
    found = []
    for path, leaf in leaves(answer):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif not isinstance(leaf, _SENDABLE):
            raise InvalidArgument(
                f"{path}: the program gives a {type(leaf).__qualname__}, which cannot be sent",
                field="batch",
                reason="OUTPUT_UNSUPPORTED",
            )
    encoded = (from_torch(tensor) for tensor in found)
    if sum(tensor.nbytes for tensor in found) >= INLINE_BYTES:
        encoded = iter(segments.write(encoded))
    return map_leaves(lambda leaf: next(encoded) if isinstance(leaf, torch.Tensor) else leaf, dict(answer))
