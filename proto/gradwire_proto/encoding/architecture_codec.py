"""Architectures to messages and back. Which classes there are, and what they take, is for the ranks to say."""

from __future__ import annotations

import re

from gradwire_proto.encoding.scalar_codec import check_name
from gradwire_proto.encoding.tensor_codec import decode_options, encode_options
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import program_pb2 as pb
from gradwire_proto.values import ArchitectureSpec, TensorData, leaves

MAX_WEIGHTS_LENGTH = 255

_FOLDERS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def encode_architecture(
    value: ArchitectureSpec, into: pb.Architecture | None = None, field: str = "architecture"
) -> pb.Architecture:
    """The message of an architecture."""
    message = pb.Architecture() if into is None else into
    message.name = check_name(value.name, f"{field}.name")
    encode_options(value.config, message.config, f"{field}.config")
    message.weights = value.weights or ""
    return message


def decode_architecture(message: pb.Architecture, field: str = "architecture") -> ArchitectureSpec:
    """The architecture of a message. Refuses tensors in its config, and weights that are no path of plain folders."""
    config = decode_options(message.config, f"{field}.config")
    for path, leaf in leaves(config, f"{field}.config"):
        if isinstance(leaf, TensorData):
            raise InvalidArgument("a config holds no tensors", field=path, reason="ARCHITECTURE_INVALID")
    return ArchitectureSpec(
        name=check_name(message.name, f"{field}.name"),
        config=config,
        weights=check_weights(message.weights, f"{field}.weights") if message.weights else None,
    )


def check_weights(path: str, field: str) -> str:
    """`path`, which must lead down: folders of [A-Za-z0-9._-], none of which begins with a dot."""
    if len(path) > MAX_WEIGHTS_LENGTH or not _FOLDERS.fullmatch(path):
        raise InvalidArgument(
            f"expected folders below the one that the service allows, such as 'team/gpt2', of at most"
            f" {MAX_WEIGHTS_LENGTH} characters; got {path[:80]!r}",
            field=field,
            reason="WEIGHTS_PATH_INVALID",
        )
    return path
