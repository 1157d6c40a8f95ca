"""A model that the service makes for a call, or none: what a failed call may have left is deleted again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gradwire.deadline import Deadline
from gradwire.errors import AlreadyExists, GradwireError, Interrupted
from gradwire.outcome import reserve
from gradwire.rpc import Rpc
from gradwire_proto.names import command_name, model_name
from gradwire_proto.v1 import gradient_service_pb2 as pb


def make_model(
    rpc: Rpc,
    method: str,
    request: pb.CreateModelRequest | pb.RestoreModelRequest,
    deadline: Deadline,
    send_again: Callable[[Deadline], None] | None = None,
) -> Any:
    """The service's reply to `request`, which names the model. The clean-up of a failure ends by `deadline` too."""
    command, kept = command_name(request.model_id, request.request_id), reserve(deadline.left)
    try:
        return rpc.call(method, request, deadline=deadline, command=command, send_again=send_again, kept=kept)
    except (GradwireError, Interrupted) as error:
        # Nobody would hold what is made after all, and its ranks would be taken.
        if error.outcome != "not_applied" and not isinstance(error, AlreadyExists):
            undo = pb.DeleteModelRequest(name=model_name(request.model_id), made_by=request.request_id)
            # Ctrl-C has a time of its own.
            left = Deadline(kept) if isinstance(error, Interrupted) else deadline
            with suppress(GradwireError):
                rpc.call("DeleteModel", undo, deadline=left, repeat=False)
        raise
