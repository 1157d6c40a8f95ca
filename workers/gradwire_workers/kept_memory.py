"""Memory that a step has freed stays with the rank for the next one, which needs as much."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_KEPT_BYTES = 512 << 20
_OWN_MAPPING_BYTES = 32 << 20  # glibc takes no more.


def keep_freed_memory() -> None:
    """Let the allocator keep up to half a GiB that is free, instead of asking for fresh pages in each step.

    Left to itself, glibc gives gradients and activations back when they are freed, and each page costs as much as what
    is computed on it once they are asked for again: a sixth of a medium network's step. Does nothing where the C
    library is another one. RankFootprint has the memory given back where a rank changes its owner.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
