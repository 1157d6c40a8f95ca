"""Runs torch.export on a callable of flat tensors, with rows left open where possible, and explains failures."""

from __future__ import annotations

import builtins
import io
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gradwire.module_guard import custom_functions_refused
from gradwire_proto.errors import ExportError, GradwireError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


class Traced(nn.Module):
    """A module whose forward is `function` of flat tensors; it holds `module`, which that runs, so that names stay."""

    PREFIX = "module."

    def __init__(self, function: Callable[..., Any], module: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(*tensors)


def trace(
    function: Callable[..., Sequence[Any]], module: nn.Module | None, tensors: Sequence[Tensor], rows: Sequence[bool]
) -> ExportedProgram:
    """The graph of `function`, which takes `tensors` and runs `module`.

    rows: for each tensor, whether its dimension 0 is the batch's rows and may vary. Raises whatever torch.export does.
    """
    symbol = Dim("rows")
    shapes = tuple({0: symbol} if has_rows else None for has_rows in rows)
    # Only what varies says so: a graph without open dimensions is exported as it stands.
    dynamic = (shapes,) if any(rows) else None
    with quiet(), custom_functions_refused(), torch.enable_grad(), ambient_autocast_off(), open_len():
        return torch.export.export(Traced(function, module), tuple(tensors), strict=False, dynamic_shapes=dynamic)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export's warnings and printed graphs are for its developers; failures are told by our own errors."""
    loggers = [
        logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.split(".")[0] == "torch"
    ]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with warnings.catch_warnings(), redirect_stderr(_OtherThreads(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


class _OtherThreads(io.TextIOBase):
    """Standard error without what this thread writes: torch.export prints unfinished graphs there."""

    def __init__(self, target: TextIO) -> None:
        self._target = target
        self._thread = threading.get_ident()

    def write(self, text: str, /) -> int:
        return len(text) if threading.get_ident() == self._thread else self._target.write(text)

    def flush(self) -> None:
        self._target.flush()


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def open_len() -> Iterator[None]:
    """Inside, `len(tensor)` leaves an open dimension open: Python's own would turn it into the example's number."""
    thread, plain = threading.get_ident(), builtins.len

    def length(value: Any, /) -> Any:
        if isinstance(value, Tensor) and threading.get_ident() == thread and value.dim():
            return value.shape[0]
        return plain(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = plain


@contextmanager
def ambient_autocast_off() -> Iterator[None]:
    """An autocast that happens to be on around the call is no part of the module."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def explain(error: Exception, subject: str) -> GradwireError:
    """The ExportError that says why `subject` could not be exported, and where in the user's code."""
    if isinstance(error, GradwireError):
        return error
    place = _place(error)
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error):
        return ExportError(
            f"{subject} branches on a tensor's values{place}, which a graph cannot: use torch.where, or keep that"
            " decision out of the forward",
            reason="EXPORT_DATA_DEPENDENT",
        )
    return ExportError(f"{subject} cannot be exported{place}: {name}: {_first_lines(error)}", reason="EXPORT_FAILED")


def quote(error: Exception) -> str:
    """An error of the user's own code, in one line, with its place."""
    return f"{type(error).__name__}: {_first_lines(error)}{_place(error)}"


def _place(error: BaseException) -> str:
    """ " at file:line" of the innermost line that is the user's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_TORCH, _HERE, "<")):
            return f" at {frame.filename}:{frame.lineno}"
    return ""


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:600]
