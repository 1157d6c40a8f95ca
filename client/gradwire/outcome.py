"""What became of a call whose answer was lost: asks the service, within the little time that is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradwire.attempts import Attempts, is_passing
from gradwire.errors import GradwireError
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

Send = Callable[[str, Any, float], Any]
"""(method, request, timeout) -> reply, raising GradwireError."""

_OUTCOMES: dict[int, str] = {
    model_pb2.COMMAND_STATE_APPLIED: "applied",
    model_pb2.COMMAND_STATE_NOT_APPLIED: "not_applied",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """alive: whether the service answered. outcome: "applied", "not_applied" or "unknown"."""

    alive: bool
    outcome: str


def reserve(budget: float) -> float:
    """Seconds to keep of a call's `budget`, so that asking fits into it."""
    return min(2.0, 0.2 * budget)


def ask(send: Send, command: str | None, attempts: Attempts) -> Standing:
    """Ask what became of `command` ("models/{model}/commands/{request_id}") while there is time for `attempts`.

    Without a command only whether the service is alive is asked.
    """
    if command is None:
        return Standing(_answers(send, attempts.seconds_left), "not_applied")
    # First without waiting: a service that answers is alive, however long the command still runs.
    is_alive = waits = False
    while True:
        try:
            state = send("GetCommand", pb.GetCommandRequest(name=command, wait=waits), attempts.seconds_left).state
        except GradwireError as error:
            is_answer = _said_by_service(error)
            is_alive |= is_answer
            if error.reason == "COMMAND_NOT_FOUND":
                # The service has noted it: a request that is still on its way will be refused.
                return Standing(True, "not_applied")
            # A model that recovers knows its commands when it is back.
            if not (is_answer and is_passing(error) and attempts.wait(error, _no_wait)):
                return Standing(is_alive, "unknown")
            waits = True
        else:
            if waits or state in _OUTCOMES:
                return Standing(True, _OUTCOMES.get(state, "unknown"))
            is_alive = waits = True


def _no_wait(seconds: float) -> None:
    """Whoever has answered is connected."""


def _answers(send: Send, seconds: float) -> bool:
    try:
        send("GetServerInfo", pb.GetServerInfoRequest(), seconds)
    except GradwireError as error:
        return _said_by_service(error)
    return True


def _said_by_service(error: GradwireError) -> bool:
    return error.reason not in ("NOT_CONNECTED", "NO_ANSWER", "CONNECTION_LOST")
