"""Errors to gRPC status and back, by one table. The form is AIP-193's: one ErrorInfo, and details where they apply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from gradwire_proto import errors
from gradwire_proto.errors import GradwireError

_M = TypeVar("_M", bound=Message)

DOMAIN = "gradwire"

STATUS_OF: dict[type[GradwireError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ExportError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.CheckpointNotFound: grpc.StatusCode.NOT_FOUND,
    errors.DatasetNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.RankLost: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    GradwireError: grpc.StatusCode.UNKNOWN,
}
"""The status of every error. Read the other way, the first class of a code stands for it."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_KINDS: dict[grpc.StatusCode, type[GradwireError]] = {}
for _kind, _code in STATUS_OF.items():
    _KINDS.setdefault(_code, _kind)

_DETAILS_KEY = "grpc-status-details-bin"

# What grpc itself says when a call never left this process, or never reached the service's code.
_NOT_SENT = ("failed to connect to all addresses", "DNS resolution failed", "CLIENT: Sent message larger than max")
_NOT_TAKEN = ("SERVER: Received message larger than max",)
# Codes that say nothing about what the service did with the request.
_CUT_OFF = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
}

# Trailing metadata is bounded (8 KiB by default) and carries the message twice, percent-encoded and in base64.
_MESSAGE_BYTES = 1000
_FIELD_BYTES = 300
_DESCRIPTION_BYTES = 300


def to_status(error: GradwireError) -> status_pb2.Status:
    """The status of an error. Long messages are cut, so that the answer's metadata stays within its bounds."""
    code = next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)
    status = status_pb2.Status(code=code.value[0], message=_cut(str(error), _MESSAGE_BYTES))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: GradwireError) -> Iterable[Message]:
    metadata = {"error": type(error).__name__, "outcome": error.outcome, "retryable": str(error.retryable).lower()}
    if error.request_id:
        metadata["request_id"] = _cut(error.request_id, _FIELD_BYTES)
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    description = _cut(error.message, _DESCRIPTION_BYTES)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, _FIELD_BYTES), description=description
        )
        yield error_details_pb2.BadRequest(field_violations=[violation])
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        yield retry
    if error.resource:
        resource = _cut(error.resource, _FIELD_BYTES)
        if isinstance(error, errors.FailedPrecondition):
            violation = error_details_pb2.PreconditionFailure.Violation(
                type=error.reason, subject=resource, description=description
            )
            yield error_details_pb2.PreconditionFailure(violations=[violation])
        else:
            yield error_details_pb2.ResourceInfo(resource_type=_resource_type(resource), resource_name=resource)


def _resource_type(name: str) -> str:
    if "checkpoints/" in name:
        return "gradwire.dev/Checkpoint"
    if name.startswith("datasets/"):
        return "gradwire.dev/Dataset"
    return "gradwire.dev/Command" if "/commands/" in name else "gradwire.dev/Model"


def abort_arguments(error: GradwireError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """(code, details, trailing metadata): what `context.abort` takes, in grpc and in grpc.aio."""
    status = to_status(error)
    return _CODES[status.code], status.message, ((_DETAILS_KEY, status.SerializeToString()),)


def from_status(status: status_pb2.Status) -> GradwireError:
    """The error whose status `to_status` has made."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _from_status(status, code) or _KINDS.get(code, errors.InternalError)(status.message)


def from_rpc_error(error: grpc.RpcError, *, command: bool, request_id: str | None = None) -> GradwireError:
    """The error that the service raised, or the one that a broken, refused or late call stands for.

    command: whether the call changes a model. Then a call that was cut off has the outcome "unknown", and the repeat of
    its request id settles it.
    """
    call = cast(grpc.Call, error)  # Every RpcError of a finished call is one, in grpc and in grpc.aio.
    code = call.code()
    status = _attached_status(cast(Iterable[tuple[str, bytes]], call.trailing_metadata() or ()))
    translated = _from_status(status, code) if status is not None else None
    if translated is None:
        translated = _from_plain(code, call.details() or "", command)
    if translated.request_id is None:
        translated.request_id = request_id
    return translated


def _attached_status(metadata: Iterable[tuple[str, bytes]]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _from_status(status: status_pb2.Status, code: grpc.StatusCode) -> GradwireError | None:
    info = _unpack(status.details, error_details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN:
        return None
    kind = errors.by_name(info.metadata["error"]) if "error" in info.metadata else _KINDS.get(code)
    # A name that this SDK does not know yet, or that contradicts the code: the code decides.
    if kind is None or STATUS_OF[kind] is not code:
        kind = _KINDS.get(code, errors.InternalError)
    bad_request = _unpack(status.details, error_details_pb2.BadRequest)
    retry = _unpack(status.details, error_details_pb2.RetryInfo)
    field = bad_request.field_violations[0].field if bad_request and bad_request.field_violations else None
    return kind(
        status.message.removeprefix(f"{field}: ") if field else status.message,
        reason=info.reason,
        field=field,
        request_id=info.metadata.get("request_id"),
        retryable=info.metadata["retryable"] == "true" if "retryable" in info.metadata else None,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        outcome=info.metadata.get("outcome", "not_applied"),
        resource=_resource(status.details),
    )


def _resource(details: Iterable[AnyMessage]) -> str | None:
    resource = _unpack(details, error_details_pb2.ResourceInfo)
    if resource is not None:
        return resource.resource_name
    failure = _unpack(details, error_details_pb2.PreconditionFailure)
    return failure.violations[0].subject or None if failure is not None and failure.violations else None


def _unpack(details: Iterable[AnyMessage], kind: type[_M]) -> _M | None:
    for detail in details:
        if detail.TypeName() == kind.DESCRIPTOR.full_name:
            message = kind()
            return message if detail.Unpack(message) else None
    return None


def _from_plain(code: grpc.StatusCode, details: str, command: bool) -> GradwireError:
    """The error that stands for a status without our details: grpc's own, a proxy's or another server's."""
    kind = _KINDS.get(code, errors.InternalError)
    not_applied = not command or code not in _CUT_OFF or details.startswith(_NOT_SENT + _NOT_TAKEN)
    reason = None
    if "message larger than max" in details:
        reason = "MESSAGE_TOO_LARGE"
        details = f"{details}: above the setting message_bytes"
    elif code is grpc.StatusCode.UNAVAILABLE:
        reason = "CONNECTION_FAILED" if details.startswith(_NOT_SENT) else "CONNECTION_LOST"
        details = f"the service cannot be reached: {details}"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "the timeout ran out before the service answered"
    message = details or code.value[1]
    if not not_applied:
        message += "; whether the command was applied is unknown, repeating its request id settles it"
    return kind(message, reason=reason, outcome="not_applied" if not_applied else "unknown")


def _cut(text: str, size: int) -> str:
    """`text` in at most `size` bytes of UTF-8. What UTF-8 cannot encode is replaced."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return encoded.decode()
    return encoded[: size - 3].decode(errors="ignore") + "…"
