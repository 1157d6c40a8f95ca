"""Errors that come when a command has already changed the model: its answer is lost, what it did is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradwire_proto.errors import GradwireError, InternalError


@contextmanager
def errors_after_applied() -> Iterator[None]:
    """Gives every error the outcome "applied". Those that are not ours come out as InternalError."""
    try:
        yield
    except GradwireError as error:
        error.outcome = "applied"
        raise
    except Exception as error:
        raise InternalError(f"{type(error).__name__}: {error}", outcome="applied") from error
