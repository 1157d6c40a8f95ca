"""How commands end: errors as one line on stderr, and an exit code that scripts can use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gradwire.errors import (
    CheckpointNotFound,
    DeadlineExceeded,
    FailedPrecondition,
    GradwireError,
    InvalidArgument,
    ModelNotFound,
    Unavailable,
)

FAILED, USAGE, UNAVAILABLE, NOT_FOUND = 1, 2, 3, 4


@contextmanager
def exit_codes() -> Iterator[None]:
    """Inside, errors end the program."""
    try:
        yield
    except GradwireError as error:
        typer.echo(f"gradwire: {error}", err=True)
        raise typer.Exit(_exit_code(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _exit_code(error: GradwireError) -> int:
    if isinstance(error, (ModelNotFound, CheckpointNotFound)):
        return NOT_FOUND
    if isinstance(error, (Unavailable, DeadlineExceeded)):
        return UNAVAILABLE
    if isinstance(error, InvalidArgument) and not isinstance(error, FailedPrecondition):
        return USAGE
    return FAILED
