"""Checkpoints, and requests about them, to messages and back."""

from __future__ import annotations

from gradwire_proto.encoding.scalar_codec import INT32_MAX, check_integer, decode_time, encode_time
from gradwire_proto.names import (
    check_checkpoint_id,
    check_model_id,
    checkpoint_name,
    model_name,
    parse_checkpoint_name,
    parse_model_name,
)
from gradwire_proto.v1 import checkpoint_pb2
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Checkpoint


def encode_checkpoint(value: Checkpoint, into: checkpoint_pb2.Checkpoint | None = None) -> checkpoint_pb2.Checkpoint:
    """The message that describes a checkpoint."""
    message = checkpoint_pb2.Checkpoint() if into is None else into
    message.name = checkpoint_name(value.name)
    message.model = model_name(value.model_id)
    message.step = value.step
    message.command = value.command
    encode_time(value.created_at, message.create_time)
    message.size_bytes = value.nbytes
    message.automatic = value.automatic
    return message


def decode_checkpoint(message: checkpoint_pb2.Checkpoint, field: str = "checkpoint") -> Checkpoint:
    """The checkpoint that a message describes."""
    return Checkpoint(
        name=parse_checkpoint_name(message.name, f"{field}.name"),
        model_id=parse_model_name(message.model, f"{field}.model"),
        step=check_integer(message.step, f"{field}.step", minimum=0),
        command=check_integer(message.command, f"{field}.command", minimum=0),
        created_at=decode_time(message.create_time),
        nbytes=check_integer(message.size_bytes, f"{field}.size_bytes", minimum=0),
        automatic=message.automatic,
    )


def decode_new_checkpoint(message: pb.CreateCheckpointRequest) -> tuple[str, str | None]:
    """(id of the model to save, name of its checkpoint or None for one that the service chooses)."""
    name = check_checkpoint_id(message.checkpoint_id) if message.checkpoint_id else None
    return parse_model_name(message.parent, "parent"), name


def decode_restoration(message: pb.RestoreModelRequest) -> tuple[str, str | None, int | None]:
    """(name of the checkpoint, id of the model or None for the saved one's, ranks or None for as many as it had)."""
    name = parse_checkpoint_name(message.checkpoint, "checkpoint")
    model_id = check_model_id(message.model_id) if message.model_id else None
    return name, model_id, check_integer(message.workers, "workers", minimum=0, maximum=INT32_MAX) or None
