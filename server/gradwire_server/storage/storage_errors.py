"""What a client hears when the storage fails: the one table from errno to errors."""

from __future__ import annotations

import errno
from pathlib import Path

from gradwire_proto.errors import FailedPrecondition, GradwireError, ResourceExhausted, Unavailable

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def storage_error(error: OSError, doing: str, *, outcome: str = "not_applied") -> GradwireError:
    """The error for a failed system call; `doing` completes "cannot ...".

    ResourceExhausted STORAGE_FULL, FailedPrecondition STORAGE_READ_ONLY, or Unavailable STORAGE_UNREACHABLE.
    """
    text = f"the service's storage cannot {doing}: {error.strerror or error}"
    if error.errno in _FULL:
        return ResourceExhausted(text, reason="STORAGE_FULL", retryable=True, outcome=outcome)
    if error.errno in _READ_ONLY:
        return FailedPrecondition(text, reason="STORAGE_READ_ONLY", outcome=outcome)
    return Unavailable(text, reason="STORAGE_UNREACHABLE", outcome=outcome)


def journal_corrupt(path: Path, offset: int, what: str) -> FailedPrecondition:
    """FailedPrecondition JOURNAL_CORRUPT, which names the file and the byte."""
    return FailedPrecondition(f"{path}, byte {offset}: {what}", reason="JOURNAL_CORRUPT")
