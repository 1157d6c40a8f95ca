"""Changes of a model's settings to messages and back."""

from __future__ import annotations

from gradwire_proto.encoding.model_codec import decode_labels
from gradwire_proto.encoding.optimizer_codec import decode_optimizer, encode_optimizer
from gradwire_proto.encoding.scalar_codec import check_name, check_number, check_text
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits, ModelUpdate

MAX_TRAINABLE = 1024
"""Patterns in one request: each is compared with the name of every parameter."""


def encode_model_update(value: ModelUpdate, into: pb.UpdateModelRequest) -> pb.UpdateModelRequest:
    """Write what is to be changed into the request."""
    for pattern, trainable in value.trainable:
        into.trainable.add(pattern=check_text(pattern, "trainable"), trainable=trainable)
    if value.optimizer is not None:
        encode_optimizer(value.optimizer, into.optimizer)
    if value.lr is not None:
        into.learning_rate = value.lr
    if value.labels is not None:
        into.labels.SetInParent()
        into.labels.labels.update(value.labels)
    return into


def decode_model_update(message: pb.UpdateModelRequest, limits: Limits | None = None) -> ModelUpdate:
    """What the request changes, which must be something. InvalidArgument NOTHING_TO_UPDATE, TOO_MANY_PATTERNS."""
    if len(message.trainable) > MAX_TRAINABLE:
        raise InvalidArgument(
            f"expected at most {MAX_TRAINABLE} patterns, got {len(message.trainable)}",
            field="trainable",
            reason="TOO_MANY_PATTERNS",
        )
    update = ModelUpdate(
        trainable=tuple(
            (check_name(each.pattern, f"trainable[{index}].pattern"), each.trainable)
            for index, each in enumerate(message.trainable)
        ),
        optimizer=decode_optimizer(message.optimizer, limits=limits) if message.HasField("optimizer") else None,
        lr=check_number(message.learning_rate, "learning_rate") if message.HasField("learning_rate") else None,
        labels=decode_labels(message.labels.labels, "labels.labels") if message.HasField("labels") else None,
    )
    if update == ModelUpdate():
        raise InvalidArgument(
            "expected trainable, optimizer, learning_rate or labels, got nothing", reason="NOTHING_TO_UPDATE"
        )
    return update
