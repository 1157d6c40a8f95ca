"""From the bytes of a request to its message, and to what the service knows of it besides."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError, Message

from gradwire_proto.codec import refuse_many_parts, refuse_unknown_fields
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.names import check_request_id
from gradwire_server.calls import Call
from gradwire_server.fingerprints import fingerprint

_FEW_PARTS_BYTES = 64 << 10
"""A request of fewer bytes cannot have many parts: each takes two."""


def parse(kind: type[Message], raw: bytes, method: str, call: Call, message_bytes: int) -> tuple[Any, Call]:
    """The message of a request to `method`, and its call, which goes on from `call`.

    Raises InvalidArgument, and ResourceExhausted MESSAGE_TOO_LARGE.
    """
    if len(raw) > message_bytes:
        raise ResourceExhausted(
            f"the request has {len(raw)} bytes, and the server's setting message_bytes allows {message_bytes} in a"
            " message; send large tensors with UploadTensors",
            reason="MESSAGE_TOO_LARGE",
        )
    request = parse_one(kind, raw)
    # Not dataclasses.replace, which takes ten times as long.
    return request, Call(
        arrived=call.arrived,
        deadline=call.deadline,
        method=method,
        raw=raw,
        request_id=check_request_id(getattr(request, "request_id", "")),
        body=fingerprint(method, raw),
    )


def parse_one(kind: type[Message], raw: bytes) -> Any:
    """The message, none of whose fields are unknown."""
    try:
        request = kind.FromString(raw)
    except DecodeError:
        raise InvalidArgument(
            f"the bytes are no {kind.DESCRIPTOR.full_name} message", reason="MALFORMED_MESSAGE"
        ) from None
    if len(raw) > _FEW_PARTS_BYTES:
        refuse_many_parts(request)
    refuse_unknown_fields(request)
    return request
