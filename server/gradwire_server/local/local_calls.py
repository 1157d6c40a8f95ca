"""Calls that clients of this machine make over their socket: what grpc itself costs is more than a small step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2

from gradwire_proto.encoding.nested_tensors import tensors_of
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.status import to_status
from gradwire_proto.v1 import gradient_service_pb2 as service_pb2
from gradwire_proto.v1 import local_pb2 as pb
from gradwire_server.admission import Admission
from gradwire_server.begun import begin
from gradwire_server.calls import Call
from gradwire_server.failures import answer_of
from gradwire_server.local.call_files import request_of
from gradwire_server.request_parsing import parse
from gradwire_server.rpc_handlers import SERVICE

Method = Callable[[bytes, Call], Awaitable[bytes]]
"""Takes the bytes of a request and gives those of its response."""

CheckScope = Callable[[str, Any], None]
"""Takes the name of a method and a request."""

PARSED = ("ForwardBackward", "OptimizerStep", "ZeroGrad", "ComputeGradients", "Forward")
"""Methods of the servicer that can be called so, beside those that parse for themselves."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call has come to: its response, or an error. download: the name of that which the response names."""

    response: bytes = b""
    error: status_pb2.Status | None = None
    download: str = ""


_Called = Callable[[bytes, Call, CheckScope], Awaitable[Answer]]


class LocalCalls:
    """What can be called. `own`: methods that take and give bytes, by name; `servicer` has those that do not."""

    def __init__(self, servicer: Any, own: Mapping[str, Method], admission: Admission, message_bytes: int) -> None:
        self._admission = admission
        self._methods = {name: _parsed(servicer, name, message_bytes) for name in PARSED}
        self._methods |= {name: _unparsed(method) for name, method in own.items()}

    def begin(
        self,
        request: pb.LocalCall,
        files: Sequence[int],
        answered: Callable[[Answer], None],
        check_scope: CheckScope,
    ) -> asyncio.Future[Answer]:
        """Make a call. Cancelled, it is given up as a call of gRPC is. files: what came with it.

        answered: may be called with that reply before, as soon as it is there; even before this returns. check_scope:
        raises PermissionDenied for a request that its caller may not make. Raises InvalidArgument where it is none.
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
            answered=lambda response: answered(Answer(response)),
        )
        return begin(self._answer(method, request_of(request, files), call, check_scope))

    async def _answer(self, method: _Called, raw: bytes, call: Call, check_scope: CheckScope) -> Answer:
        try:
            with self._admission:
                return await method(raw, call, check_scope)
        except Exception as error:
            return Answer(error=to_status(answer_of(error, call.request_id)))


def _unparsed(method: Method) -> _Called:
    async def called(raw: bytes, call: Call, check_scope: CheckScope) -> Answer:
        return Answer(await method(raw, call))

    return called


def _parsed(servicer: Any, name: str, message_bytes: int) -> _Called:
    kind, answer = GetMessageClass(SERVICE.methods_by_name[name].input_type), getattr(servicer, name)

    async def method(raw: bytes, call: Call, check_scope: CheckScope) -> Answer:
        request, call = parse(kind, raw, name, call, message_bytes)
        try:
            check_scope(name, request)
            response = await answer(request, call)
            return Answer(response.SerializeToString(), download=_download_in(response))
        except Exception as error:
            raise answer_of(error, call.request_id) from None

    return method


def _download_in(response: Any) -> str:
    """The download that holds the response's tensors: all of them, or none."""
    for tensor in _tensors_of(response):
        return tensor.handle.rpartition("/tensors/")[0]
    return ""


def _tensors_of(response: Any) -> Iterator[Any]:
    if isinstance(response, service_pb2.ComputeGradientsResponse):
        yield from (named.tensor for named in response.gradients)
        yield from (each.values for each in response.sparse_gradients)
        yield from tensors_of(response.input_gradients)
    if isinstance(response, service_pb2.ComputeGradientsResponse | service_pb2.ForwardResponse):
        yield from tensors_of(response.outputs)
