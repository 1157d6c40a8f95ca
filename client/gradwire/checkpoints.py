"""Saved models: listed, deleted, and made models of again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradwire.arguments import as_count, as_text, wrong_type
from gradwire.deadline import Deadline
from gradwire.made_models import as_wait, make_model
from gradwire.rpc import Rpc, new_request_id
from gradwire_proto import codec
from gradwire_proto.names import check_checkpoint_id, check_model_id, checkpoint_name
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Checkpoint, ModelInfo


def creation_request(parent: str, name: str | None) -> pb.CreateCheckpointRequest:
    """The request that saves the model `parent`, "models/{model}". None: the service chooses the name."""
    checkpoint_id = "" if name is None else check_checkpoint_id(as_text(name, "name"), "name")
    return pb.CreateCheckpointRequest(parent=parent, checkpoint_id=checkpoint_id, request_id=new_request_id())


def get_checkpoint(rpc: Rpc, name: str, deadline: Deadline | None = None) -> Checkpoint:
    """See `Client.get_checkpoint`. deadline: that of the call of which this is a part."""
    request = pb.GetCheckpointRequest(name=checkpoint_name(_name_of(name), "name"))
    return codec.decode_checkpoint(rpc.call("GetCheckpoint", request, deadline=deadline))


def list_checkpoints(rpc: Rpc) -> Iterator[Checkpoint]:
    """See `Client.list_checkpoints`."""
    request, deadline = pb.ListCheckpointsRequest(), Deadline(rpc.timeout)
    while True:
        reply = rpc.call("ListCheckpoints", request, deadline=deadline)
        yield from map(codec.decode_checkpoint, reply.checkpoints)
        if not reply.next_page_token:
            return
        request.page_token = reply.next_page_token


def delete_checkpoint(rpc: Rpc, checkpoint: Checkpoint | str) -> None:
    """See `Client.delete_checkpoint`."""
    request = pb.DeleteCheckpointRequest(
        name=checkpoint_name(_name_of(checkpoint), "name"), request_id=new_request_id()
    )
    rpc.call("DeleteCheckpoint", request, deletes=True)


def restore_model(
    rpc: Rpc, checkpoint: Checkpoint | str, model_id: str | None, workers: int | None, wait_for_capacity: float
) -> ModelInfo:
    """See `Client.restore_model`."""
    name = checkpoint_name(_name_of(checkpoint))
    count, wait = as_count(workers, "workers"), as_wait(wait_for_capacity)
    deadline = Deadline(rpc.timeout)
    if model_id is None:
        saved = checkpoint if isinstance(checkpoint, Checkpoint) else get_checkpoint(rpc, checkpoint, deadline)
        model_id = saved.model_id
    request = pb.RestoreModelRequest(
        checkpoint=name, model_id=check_model_id(model_id), workers=count or 0, request_id=new_request_id()
    )
    return codec.decode_model_info(make_model(rpc, "RestoreModel", request, deadline, wait=wait))


def _name_of(checkpoint: Any) -> str:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.name
    if isinstance(checkpoint, str):
        return checkpoint
    raise wrong_type(checkpoint, "checkpoint", "a Checkpoint or its name")
