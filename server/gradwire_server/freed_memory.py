"""Memory that is freed goes back to the system, so that big tensors that have passed leave the frontend small."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_OWN_MAPPING_BYTES = 8 << 20
"""Above the chunks of a stream and most batches: fresh pages would cost more than what is done with them."""

_KEPT_BYTES = 32 << 20
"""Freed memory that is kept for the next message."""


def return_freed_memory() -> None:
    """Give every big allocation a mapping of its own, and threads few heaps to scatter the others over.

    Left to itself, glibc takes ever bigger ones from heaps, and each thread's heap stays as big as it ever was. Does
    nothing where the C library is another one.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
