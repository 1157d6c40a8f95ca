"""Requests and responses of calls that do not fit into a packet: in files of memory beside it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.local_wire import CALL_BYTES, SEALS, has_seals
from gradwire_proto.v1 import local_pb2 as pb


def request_of(call: pb.LocalCall, files: Sequence[int]) -> bytes:
    """The bytes of a call's request, which are nobody else's: what its sender does to the file comes too late.

    Raises InvalidArgument REQUEST_FILE_INVALID.
    """
    if not call.request_bytes:
        return call.request
    if call.request or len(files) != 1 or not 0 < call.request_bytes <= CALL_BYTES:
        raise _invalid(f"expected one file, and 1 to {CALL_BYTES} bytes of a request in it alone")
    (file,) = files
    # Not only because it could shrink: to read from a file of another kind may take for ever.
    if not has_seals(file, fcntl.F_SEAL_SHRINK):
        raise _invalid("expected a memfd that is sealed against shrinking")
    request = os.pread(file, call.request_bytes, 0)
    if len(request) < call.request_bytes:
        raise _invalid(f"expected a file of at least {call.request_bytes} bytes, got {len(request)}")
    return request


def response_file(response: bytes) -> int:
    """A descriptor of a file with a response, which nobody can change."""
    file = os.memfd_create("gradwire-response", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(response)
        while rest:
            rest = rest[os.write(file, rest) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(file)
        raise
    return file


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="call.request_bytes", reason="REQUEST_FILE_INVALID")
