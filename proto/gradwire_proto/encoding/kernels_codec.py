"""Compiled kernels to messages and back."""

from __future__ import annotations

from collections.abc import Iterable

from gradwire_proto.encoding.enum_words import KERNELS_STATES
from gradwire_proto.encoding.scalar_codec import check_integer, check_name
from gradwire_proto.v1 import kernels_pb2 as pb
from gradwire_proto.values import BatchShapes, CompiledKernels, LeafShape


def encode_batch_shapes(value: BatchShapes, into: pb.BatchShapes | None = None) -> pb.BatchShapes:
    """The message of some shapes."""
    message = pb.BatchShapes() if into is None else into
    message.variant = value.variant
    for leaves, messages in ((value.inputs, message.inputs), (value.targets, message.targets)):
        for leaf in leaves:
            messages.add(is_tensor=leaf is not None, sizes=leaf or ())
    return message


def decode_batch_shapes(message: pb.BatchShapes, field: str = "batches") -> BatchShapes:
    """The shapes of a message."""
    return BatchShapes(
        check_name(message.variant, f"{field}.variant"),
        _leaves(message.inputs, f"{field}.inputs"),
        _leaves(message.targets, f"{field}.targets"),
    )


def _leaves(messages: Iterable[pb.LeafShape], field: str) -> tuple[LeafShape, ...]:
    return tuple(
        tuple(check_integer(size, f"{field}[{index}].sizes", minimum=0) for size in each.sizes)
        if each.is_tensor
        else None
        for index, each in enumerate(messages)
    )


def encode_compiled(value: CompiledKernels, into: pb.CompiledKernels | None = None) -> pb.CompiledKernels:
    """The message that tells of kernels."""
    message = pb.CompiledKernels() if into is None else into
    encode_batch_shapes(value.batches, message.batches)
    message.state = KERNELS_STATES.number(value.state, "state")  # pyright: ignore[reportAttributeAccessIssue]
    message.reason = value.reason
    return message


def decode_compiled(message: pb.CompiledKernels, field: str = "compiled") -> CompiledKernels:
    """The kernels that a message tells of."""
    return CompiledKernels(
        decode_batch_shapes(message.batches, f"{field}.batches"),
        KERNELS_STATES.word(message.state, f"{field}.state"),
        message.reason,
    )
