"""Calls to a service on this machine, past gRPC: they take a fraction of its time.

Where anything speaks against it, such as other threads' calls on all connections, a call goes by gRPC.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from gradwire.attempts import Lost
from gradwire.call_connection import CallConnection
from gradwire.errors import DeadlineExceeded, GradwireError, Unavailable
from gradwire.local_transport import LocalTransport
from gradwire_proto.local_wire import CALL_BYTES
from gradwire_proto.status import from_status
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import local_pb2

_SERVICE = pb.DESCRIPTOR.services_by_name["GradientService"]

LOCAL_CALLS = {
    name: GetMessageClass(_SERVICE.methods_by_name[name].output_type)
    for name in ("TrainStep", "ForwardBackward", "OptimizerStep", "ZeroGrad", "ComputeGradients", "Forward")
}
"""The kinds of responses of the methods that can be called so. One that is lost is asked again: each is a command, or
changes nothing.
"""

_MOST_CONNECTIONS = 4

_PAUSE = 1.0
"""Seconds after a failure until there is another connection."""


class LocalCalls:
    """Connections for calls, made when they are needed. Threads may share it. target: the service's name in errors."""

    def __init__(self, local: LocalTransport, target: str) -> None:
        self._local = local
        self._target = target
        self._lock = threading.Lock()
        self._idle: list[CallConnection] = []
        self._busy: set[CallConnection] = set()
        self._again_at = 0.0
        self._is_closed = False

    def ask(self, method: str, body: bytes, timeout: float, command: str | None) -> Any:
        """The response; None where nothing was sent, so that the call must go by gRPC.

        Raises what `Rpc.send` raises.
        """
        if len(body) > CALL_BYTES or not self._local.is_connected or timeout <= 0:
            return None
        connection = self._take()
        if connection is None:
            return None
        try:
            reply = connection.ask(method, body, timeout)
        except (OSError, EOFError) as error:
            self._drop(connection)
            request_id = command.rpartition("/")[2] if command else None
            raise _lost(error, self._target, request_id) from None
        except BaseException:  # Ctrl-C, say: its answer must not be taken for another one's.
            self._drop(connection)
            raise
        kind = None if reply is None else reply.message.WhichOneof("kind")
        if reply is None or kind not in ("response", "error"):
            # The service, which may be of another version, did not take it.
            self._drop(connection)
            return None
        self._put_back(connection)
        if kind == "error":
            raise _refusal(reply.message, command)
        if reply.message.HasField("brought"):
            self._local.brought(reply.message.brought, reply.files)
        return LOCAL_CALLS[method].FromString(reply.response)

    def close(self) -> None:
        """Hang up, for good: calls in flight are lost."""
        with self._lock:
            self._is_closed = True
            for connection in self._busy:
                # Whoever waits for it wakes, and closes it.
                with suppress(OSError):
                    connection.hang_up()
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _take(self) -> CallConnection | None:
        with self._lock:
            if self._is_closed:
                return None
            connection = self._idle.pop() if self._idle else None
            if connection is None:
                if len(self._busy) >= _MOST_CONNECTIONS or time.monotonic() < self._again_at:
                    return None
                more = self._local.connect_once_more()
                if more is None:
                    self._again_at = time.monotonic() + _PAUSE
                    return None
                connection = CallConnection(more)
            self._busy.add(connection)
            return connection

    def _put_back(self, connection: CallConnection) -> None:
        with self._lock:
            self._busy.discard(connection)
            if self._is_closed:
                connection.close()
            else:
                self._idle.append(connection)

    def _drop(self, connection: CallConnection) -> None:
        """It is of no use any more, and those to the same service are not, either."""
        with self._lock:
            self._busy.discard(connection)
            for each in (connection, *self._idle):
                each.close()
            self._idle.clear()
            self._again_at = time.monotonic() + _PAUSE


def _lost(error: Exception, target: str, request_id: str | None) -> Lost:
    outcome = "unknown"
    if isinstance(error, TimeoutError):
        return Lost(DeadlineExceeded("no answer in time", reason="NO_ANSWER", request_id=request_id, outcome=outcome))
    message = f"the connection to {target} was lost: {error or type(error).__name__}"
    return Lost(Unavailable(message, reason="CONNECTION_LOST", request_id=request_id, retryable=True, outcome=outcome))


def _refusal(reply: local_pb2.LocalReply, command: str | None) -> GradwireError:
    error = from_status(reply.error)
    if error.request_id is None and command:
        error.request_id = command.rpartition("/")[2]
    return error
