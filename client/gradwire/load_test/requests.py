"""One request in bytes, encoded once and sent as often as need be, and what its replies tell."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from gradwire.calls import Call
from gradwire_proto.v1 import gradient_service_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["GradientService"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The request of a call. `id_key`: the bytes that come before a request id; none where the call changes nothing."""

    method: str
    body: bytes
    id_key: bytes = b""

    @staticmethod
    def of(call: Call[Any]) -> Prepared:
        """The request as the SDK would send it, its answer in one message."""
        request, field = type(call.request)(), call.request.DESCRIPTOR.fields_by_name
        request.CopyFrom(call.request)
        if "max_inline_bytes" in field:
            # Nobody would fetch what waits to be downloaded.
            request.max_inline_bytes = 0
        if call.command is None:
            return Prepared(call.method, request.SerializeToString())
        request.ClearField("request_id")
        # Field number and wire type 2, in one byte up to field 15; then the length.
        key = bytes([field["request_id"].number << 3 | 2, len(str(uuid.uuid4()))])
        return Prepared(call.method, request.SerializeToString(), key)

    def message(self) -> bytes:
        """The bytes to send: each command has an id of its own, or the service would answer it from memory."""
        # Fields may stand in any order.
        return self.body + self.id_key + str(uuid.uuid4()).encode() if self.id_key else self.body

    @property
    def path(self) -> str:
        """What gRPC calls the method."""
        return f"/{_SERVICE.full_name}/{self.method}"


def timing_reader(method: str) -> Callable[[bytes], Any]:
    """A function that gives the Timing, in seconds, in the bytes of a reply of `method`."""
    kind: Any = GetMessageClass(_SERVICE.methods_by_name[method].output_type)
    if "result" in kind.DESCRIPTOR.fields_by_name:
        return lambda reply: kind.FromString(reply).result.timing
    return lambda reply: kind.FromString(reply).timing
