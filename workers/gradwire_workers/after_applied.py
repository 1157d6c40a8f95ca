"""Errors that come when a command has already changed the model: its answer is lost, what it did is not."""

from __future__ import annotations

from contextlib import AbstractContextManager

from gradwire_proto.errors import GradwireError, InternalError


def errors_after_applied() -> AbstractContextManager[None]:
    """Gives every error the outcome "applied". Those that are not ours come out as InternalError."""
    return _APPLIED


class _Applied:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, GradwireError):
            error.outcome = "applied"
        elif isinstance(error, Exception):
            raise InternalError(f"{type(error).__name__}: {error}", outcome="applied") from error


_APPLIED = _Applied()
