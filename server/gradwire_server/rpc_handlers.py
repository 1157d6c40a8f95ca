"""From bytes to messages and from errors to status: what every RPC has in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gradwire_proto.errors import DeadlineExceeded, ResourceExhausted
from gradwire_proto.status import abort_arguments
from gradwire_proto.v1 import gradient_service_pb2
from gradwire_server.admission import Admission
from gradwire_server.calls import Call
from gradwire_server.doors.door import Door, Guest
from gradwire_server.failures import answer_of
from gradwire_server.request_parsing import parse, parse_one
from gradwire_server.tensors.tensor_streams import parse_upload

SERVICE = gradient_service_pb2.DESCRIPTOR.services_by_name["GradientService"]

OWN = ("TrainStep", "TrainSteps", "ComputeGradients")
"""Methods that take and give bytes in place of messages, and parse for themselves."""

T = TypeVar("T")


class Place(Protocol):
    """What answers the calls of one owner."""

    @property
    def admission(self) -> Admission: ...

    @property
    def servicer(self) -> Any: ...

    @property
    def own(self) -> Mapping[str, Callable[..., Any]]:
        """The methods of OWN, by name."""
        ...


def generic_handler(door: Door[Place], message_bytes: int, stall_seconds: float) -> grpc.GenericRpcHandler:
    """The handler of every method of GradientService: what came in by the door is answered by its place's servicer, by
    the method of that name, or by one of the place's own.

    A servicer's method takes (request, call) and returns the response. It raises GradwireErrors; anything else becomes
    an InternalError that tells nothing. A stream of requests is an async iterator, a stream of responses is returned as
    one; either ends with DeadlineExceeded STREAM_STALLED where the client keeps it waiting for `stall_seconds`.
    """
    handlers = {
        method.name: (_own_handler if method.name in OWN else _handler)(method, door, message_bytes, stall_seconds)
        for method in SERVICE.methods
    }
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def _handler(
    method: MethodDescriptor, door: Door[Place], message_bytes: int, stall_seconds: float
) -> grpc.RpcMethodHandler:
    kind, name = GetMessageClass(method.input_type), method.name

    # No deserializer: grpc answers messages that it cannot parse without a word to the client.
    async def unary_unary(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        call = Call(deadline=_deadline(context))
        try:
            guest = door.admit(name, context.invocation_metadata)
            with guest.place.admission:
                request, call = parse(kind, raw, name, call, message_bytes)
                guest.check_scope(name, request)
                response = await getattr(guest.place.servicer, name)(request, call)
                return _check_size(response.SerializeToString(), message_bytes)
        except Exception as error:
            return await _abort(context, error, call)

    async def stream_unary(chunks: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        call = Call(deadline=_deadline(context))
        try:
            guest = door.admit(name, context.invocation_metadata)
            with guest.place.admission:
                async with aclosing(_parse_each(kind, chunks, stall_seconds, guest)) as requests:
                    return (await getattr(guest.place.servicer, name)(requests, call)).SerializeToString()
        except Exception as error:
            return await _abort(context, error, call)

    # What comes serialized already is sent as it is.
    async def unary_stream(raw: bytes, context: grpc.aio.ServicerContext) -> None:
        call = Call(deadline=_deadline(context))
        try:
            guest = door.admit(name, context.invocation_metadata)
            with guest.place.admission:
                request, call = parse(kind, raw, name, call, message_bytes)
                async with aclosing(getattr(guest.place.servicer, name)(request, call)) as responses:
                    async for response in responses:
                        guest.check()
                        raw = response if isinstance(response, bytes) else response.SerializeToString()
                        await _in_time(context.write(raw), stall_seconds)
        except Exception as error:
            await _abort(context, error, call)

    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(stream_unary)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(unary_stream)
    return grpc.unary_unary_rpc_method_handler(unary_unary)


def _own_handler(
    method: MethodDescriptor, door: Door[Place], message_bytes: int, stall_seconds: float
) -> grpc.RpcMethodHandler:
    name = method.name

    async def unary_unary(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        call = Call(deadline=_deadline(context))
        try:
            guest = door.admit(name, context.invocation_metadata)
            with guest.place.admission:
                return _check_size(await guest.place.own[name](raw, call), message_bytes)
        except Exception as error:
            return await _abort(context, error, call)

    async def stream_stream(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        call = Call(deadline=_deadline(context))
        try:
            guest = door.admit(name, context.invocation_metadata)
            with guest.place.admission:
                async with aclosing(guest.place.own[name](messages, call)) as responses:
                    async for response in responses:
                        guest.check()
                        await _in_time(context.write(response), stall_seconds)
        except Exception as error:
            await _abort(context, error, call)

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(stream_stream)
    return grpc.unary_unary_rpc_method_handler(unary_unary)


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def _parse_each(
    kind: type[Message], chunks: AsyncIterator[bytes], stall_seconds: float, guest: Guest[Any]
) -> AsyncGenerator[Any, None]:
    following = aiter(chunks)
    is_upload = kind is gradient_service_pb2.UploadTensorsRequest
    while (raw := await _in_time(anext(following, None), stall_seconds)) is not None:
        guest.check()
        yield parse_upload(raw) if is_upload else parse_one(kind, raw)


async def _in_time(step: Awaitable[T], stall_seconds: float) -> T:
    """The next step of a stream. A client that stands still must not hold memory that others wait for."""
    try:
        async with asyncio.timeout(stall_seconds):
            return await step
    except TimeoutError:
        raise DeadlineExceeded(
            f"the stream stood still for {stall_seconds:g} s, as long as the server's setting stall_seconds allows",
            reason="STREAM_STALLED",
        ) from None


def _check_size(raw: bytes, message_bytes: int) -> bytes:
    if len(raw) > message_bytes:
        raise ResourceExhausted(
            f"the reply has {len(raw)} bytes, and the server's setting message_bytes allows {message_bytes} in a"
            " message; set max_inline_bytes to fetch its tensors with DownloadTensors",
            reason="REPLY_TOO_LARGE",
        )
    return raw


async def _abort(context: grpc.aio.ServicerContext, error: Exception, call: Call) -> bytes:
    """End the RPC with the status of `error`; returns what the handler then may, and grpc does not look at."""
    try:
        await context.abort(*abort_arguments(answer_of(error, call.request_id)))
    except grpc.aio.AbortError as aborted:
        # The context keeps it, and its frames, which hold the request, the context.
        aborted.__context__ = None
        aborted.with_traceback(None)
    return b""
