"""A model that the service makes for a call, or none: what a failed call may have left is deleted again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from gradwire.arguments import as_number
from gradwire.capacity_waits import telling
from gradwire.deadline import Deadline
from gradwire.errors import AlreadyExists, GradwireError, Interrupted, InvalidArgument
from gradwire.outcome import reserve
from gradwire.rpc import Rpc
from gradwire_proto import codec
from gradwire_proto.names import command_name, model_name
from gradwire_proto.v1 import gradient_service_pb2 as pb


def as_wait(seconds: Any) -> float:
    """Checks how long a model may wait for capacity."""
    wait = as_number(seconds, "wait_for_capacity", minimum=0)
    if wait > codec.LONGEST_WAIT:
        message = f"expected at most {codec.LONGEST_WAIT} seconds, got {wait:g}"
        raise InvalidArgument(message, field="wait_for_capacity", reason="NUMBER_OUT_OF_RANGE")
    return wait


def make_model(
    rpc: Rpc,
    method: str,
    request: pb.CreateModelRequest | pb.RestoreModelRequest,
    deadline: Deadline,
    send_again: Callable[[Deadline], None] | None = None,
    wait: float = 0.0,
) -> Any:
    """The service's reply to `request`, which names the model. The clean-up of a failure ends by `deadline` too.

    wait: seconds that the model may wait for capacity, which the deadline does not count.
    """
    codec.encode_wait(wait, request)
    if wait:
        deadline = Deadline(deadline.left + wait)
    command, kept = command_name(request.model_id, request.request_id), reserve(deadline.left)
    try:
        with telling(rpc, model_name(request.model_id)) if wait else nullcontext():
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
