"""Runs torch.export on a callable of flat tensors, with sizes left open where possible, and explains failures."""

from __future__ import annotations

import builtins
import io
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _NormBase

from gradwire.exporting.custom_functions import Capture, LeavesUnknown
from gradwire.exporting.function_rules import needs_values
from gradwire.exporting.function_trace import FunctionFailed
from gradwire.exporting.loss_functions import TraceableLosses
from gradwire.exporting.traced_inputs import PREFIX, keep_old_values, without_copies
from gradwire_proto.autocast import autocast
from gradwire_proto.errors import ExportError, GradwireError

Openings = Mapping[int, Any]
"""The dimensions of a tensor that may vary: the batch's rows (ROWS_OPEN), or open wherever the graph lets them."""

ROWS_OPEN = Dim("rows")
OPEN_IF_POSSIBLE = Dim.AUTO

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


class Traced(nn.Module):
    """A module whose forward is `function` of flat tensors; it holds `module`, which that runs, so that names stay."""

    PREFIX = PREFIX

    def __init__(self, function: Callable[..., Any], module: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        self._function = function
        self.assigned: set[str] = set()

    def forward(self, *tensors: Tensor) -> Any:
        # torch.export sees a buffer that is assigned in its root alone: elsewhere the new value would be lost.
        before = [
            (f"{path}.{name}".removeprefix(self.PREFIX), each._buffers, name, buffer)
            for path, each in self.named_modules(remove_duplicate=False)
            for name, buffer in each._buffers.items()
            if buffer is not None
        ]
        # A copy is no leaf of autograd, and may be changed in place. `without_copies` takes it out again.
        result = self._function(*(tensor.clone() if tensor.requires_grad else tensor for tensor in tensors))
        for path, buffers, name, old in before:
            new = buffers.get(name)
            if new is not old:
                old.copy_(_new_value(path, old, new))
                buffers[name] = old
                # Under all names that its module has.
                self.assigned |= {other for other, _, _, buffer in before if buffer is old}
        return result


def _new_value(path: str, old: Tensor, new: Tensor | None) -> Tensor:
    if new is None or new.dtype != old.dtype or new.shape != old.shape:
        found = "None" if new is None else f"{new.dtype} of shape {list(new.shape)}"
        raise ExportError(
            f"the forward assigns {found} to buffer {path!r}, which is {old.dtype} of shape {list(old.shape)}: on the"
            " service a buffer keeps its type and shape",
            field=path,
            reason="EXPORT_BUFFER_CHANGED",
        )
    return new.detach()


def trace(
    function: Callable[..., Sequence[Any]],
    module: nn.Module | None,
    tensors: Sequence[Tensor],
    openings: Sequence[Openings],
    differentiable: Sequence[bool],
    restore: Callable[[], None],
    precision: str,
) -> ExportedProgram:
    """The graph of `function`, which takes `tensors` and runs `module`.

    openings: for each tensor the dimensions that may vary. differentiable: whether it may need a gradient. restore:
    puts the module back as it was, for another try. precision: under whose autocast it runs, so that the code reads the
    types that it will see. Raises whatever torch.export does.
    """
    try:
        return _export(function, module, tensors, openings, Capture(leaves_known=False), precision)
    except LeavesUnknown:
        restore()
    examples = [tensor.requires_grad_(needs) for tensor, needs in zip(tensors, differentiable, strict=True)]
    return _export(function, module, examples, openings, Capture(leaves_known=True), precision)


def _export(
    function: Callable[..., Sequence[Any]],
    module: nn.Module | None,
    tensors: Sequence[Tensor],
    openings: Sequence[Openings],
    capture: Capture,
    precision: str,
) -> ExportedProgram:
    # Only what varies says so: a graph without open dimensions is exported as it stands.
    dynamic = (tuple(dict(opening) or None for opening in openings),) if any(openings) else None
    with (
        quiet(),
        capture.active(),
        torch.enable_grad(),
        autocast(precision),
        open_len(),
        sizes_fixed_in_text(),
        open_masks(),
        TraceableLosses(),
    ):
        traced = Traced(function, module)
        exported = torch.export.export(traced, tuple(tensors), strict=False, dynamic_shapes=dynamic)
    if any(tensor.requires_grad for tensor in tensors):
        without_copies(exported)
    capture.insert(exported.graph_module)
    TraceableLosses.insert(exported.graph_module)
    keep_old_values(exported, traced.assigned)
    return exported


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
def open_masks() -> Iterator[None]:
    """Inside, torch.nn's transformers do not look into a mask for a hint that it is causal: it masks all the same."""
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextmanager
def open_len() -> Iterator[None]:
    """Inside, `len(tensor)` leaves an open dimension open: Python's own would turn it into the example's number."""
    # It takes seconds to import; torch.export does so as well.
    from torch._dynamo import trace_rules

    thread, plain = threading.get_ident(), builtins.len
    # torch.compile, which torch.cond uses, looks once which functions are Python's: it must not find this one.
    trace_rules.is_builtin_callable(plain)

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
def sizes_fixed_in_text() -> Iterator[None]:
    """Inside, an open dimension that code writes as text, such as a dictionary's key, is fixed to what it says.

    torch would write a name there, and take nothing for granted: the text would be wrong for every size. What torch
    itself writes is for its messages.
    """
    thread = threading.get_ident()
    kinds = ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool))
    before = [kind.__repr__ for kind, _ in kinds]

    def fixing(number: Callable[[Any], Any], plain: Callable[[Any], str]) -> Callable[[Any], str]:
        def text(value: Any) -> str:
            is_users = not sys._getframe(1).f_code.co_filename.startswith(_TORCH)
            return repr(number(value)) if is_users and threading.get_ident() == thread else plain(value)

        return text

    for (kind, number), plain in zip(kinds, before, strict=True):
        setattr(kind, "__repr__", fixing(number, plain))  # noqa: B010
    try:
        yield
    finally:
        for (kind, _), plain in zip(kinds, before, strict=True):
            setattr(kind, "__repr__", plain)  # noqa: B010


def explain(error: Exception, subject: str) -> GradwireError:
    """The ExportError that says why `subject` could not be exported, and where in the user's code."""
    if isinstance(error, GradwireError):
        return error
    place = _place(error)
    name = type(error).__name__
    if _in_cumulative_average(error):
        return ExportError(
            f"{subject} has a batch norm with momentum=None, which reads its counter as a Python number, and a graph"
            " cannot: give it a momentum, such as 0.1",
            reason="EXPORT_DATA_DEPENDENT",
        )
    if isinstance(error, FunctionFailed):
        return ExportError(
            f"{subject} cannot be exported{place}: {_first_lines(error)}", reason="EXPORT_CUSTOM_FUNCTION"
        )
    if needs_values(error):
        return ExportError(
            f"{subject} needs a tensor's value in Python{place} (an `if`, float(), item() ...), which a graph cannot"
            " have: use torch.cond (one of two functions) or torch.where (one of two values), or keep that decision"
            " out of the forward",
            reason="EXPORT_DATA_DEPENDENT",
        )
    return ExportError(f"{subject} cannot be exported{place}: {name}: {_first_lines(error)}", reason="EXPORT_FAILED")


def _in_cumulative_average(error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    layers = (frame.f_locals.get("self") for frame in frames if frame.f_code.co_filename.startswith(_TORCH))
    return any(isinstance(layer, _NormBase) and layer.momentum is None for layer in layers)


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
