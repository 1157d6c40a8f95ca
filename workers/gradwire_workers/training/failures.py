"""Errors of a client's program, told apart from ours."""

from __future__ import annotations

import re

import torch

from gradwire_proto.errors import GradwireError, InvalidArgument

_TARGET = re.compile(r"Target -?\d+ is out of bounds")
_INDEX = re.compile(r"index .*out of (range|bounds)|out of (range|bounds).*index", re.IGNORECASE)
_NOT_DETERMINISTIC = "does not have a deterministic implementation"
_NO_MEMORY = "can't allocate memory"


def as_program_failure(error: BaseException) -> BaseException:
    """What to raise for an error that came out of running a client's graph or loss."""
    if isinstance(error, (GradwireError, torch.OutOfMemoryError)) or not isinstance(error, Exception):
        return error
    if not isinstance(error, (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError)):
        return error
    text = str(error).strip()
    if _NO_MEMORY in text:
        return error
    first_line = text.splitlines()[0][:500] if text else type(error).__name__
    if _NOT_DETERMINISTIC in text:
        what = first_line.split(_NOT_DETERMINISTIC)[0].strip()
        message = f"{what} has no deterministic kernel on this device: create the model without deterministic"
        return InvalidArgument(message, field="model.deterministic", reason="NOT_DETERMINISTIC")
    if _TARGET.search(text):
        return InvalidArgument(first_line, field="batch.targets", reason="TARGET_OUT_OF_RANGE")
    if _INDEX.search(text):
        return InvalidArgument(first_line, field="batch.inputs", reason="INDEX_OUT_OF_RANGE")
    return InvalidArgument(f"the program failed on this batch: {first_line}", field="batch", reason="PROGRAM_FAILED")
