"""Small calls that clients of this machine make over their socket: what grpc itself costs is more than a small step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from math import isfinite
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.status import to_status
from gradwire_proto.v1 import local_pb2 as pb
from gradwire_server.admission import Admission
from gradwire_server.begun import begin
from gradwire_server.calls import Call
from gradwire_server.failures import answer_of
from gradwire_server.request_parsing import parse
from gradwire_server.rpc_handlers import SERVICE

Method = Callable[[bytes, Call], Awaitable[bytes]]
"""Takes the bytes of a request and gives those of its response."""

PARSED = ("ForwardBackward", "OptimizerStep", "ZeroGrad")
"""Methods of the servicer that can be called so, beside those that parse for themselves: their responses are small."""


class LocalCalls:
    """What can be called. `own`: methods that take and give bytes, by name; `servicer` has those that do not."""

    def __init__(self, servicer: Any, own: Mapping[str, Method], admission: Admission, message_bytes: int) -> None:
        self._admission = admission
        self._methods = {name: _parsed(servicer, name, message_bytes) for name in PARSED} | dict(own)

    def begin(self, request: pb.LocalCall, answered: Callable[[pb.LocalReply], None]) -> asyncio.Future[pb.LocalReply]:
        """Make a call; it gives its reply, an error too. Cancelled, it is given up as a call of gRPC is.

        answered: may be called with that reply before, as soon as it is there; even before this returns.
        Raises InvalidArgument where it is none.
        """
        method = self._methods.get(request.method)
        if method is None:
            message = f"expected one of {', '.join(sorted(self._methods))}, got {request.method!r}"
            raise InvalidArgument(message, field="call.method", reason="METHOD_UNKNOWN")
        if not (request.timeout_seconds > 0 and isfinite(request.timeout_seconds)):
            message = f"expected more than 0 seconds, got {request.timeout_seconds:g}"
            raise InvalidArgument(message, field="call.timeout_seconds", reason="OUT_OF_RANGE")
        call = Call(
            deadline=time.monotonic() + request.timeout_seconds,
            answered=lambda response: answered(pb.LocalReply(response=response)),
        )
        return begin(self._reply(method, request.request, call))

    async def _reply(self, method: Method, raw: bytes, call: Call) -> pb.LocalReply:
        try:
            with self._admission:
                return pb.LocalReply(response=await method(raw, call))
        except Exception as error:
            return pb.LocalReply(error=to_status(answer_of(error, call.request_id)))


def _parsed(servicer: Any, name: str, message_bytes: int) -> Method:
    kind, answer = GetMessageClass(SERVICE.methods_by_name[name].input_type), getattr(servicer, name)

    async def method(raw: bytes, call: Call) -> bytes:
        request, call = parse(kind, raw, name, call, message_bytes)
        try:
            return (await answer(request, call)).SerializeToString()
        except Exception as error:
            raise answer_of(error, call.request_id) from None

    return method
