"""Limits that do not count for a while: what a rank carries out once more was taken when they were others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gradwire_proto.values import Limits

AGAIN = "again"
"""The field of a command that is carried out once more."""

_lifted = False
# Of the process: a backward's threads must see it. A rank carries out one command at a time.


@contextmanager
def limits_lifted() -> Iterator[None]:
    """Inside, no limit counts in this process."""
    global _lifted
    before, _lifted = _lifted, True
    try:
        yield
    finally:
        _lifted = before


def are_lifted() -> bool:
    """Whether limits do not count now."""
    return _lifted


def in_force(limits: Limits) -> Limits:
    """The limits of one model as they are now."""
    if not _lifted:
        return limits
    return replace(limits, tensor_bytes=sys.maxsize, graph_nodes=sys.maxsize, model_bytes=sys.maxsize)
