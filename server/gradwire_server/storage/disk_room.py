"""Room on the disk that is taken before it is written to."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h
_NOT_OFFERED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_ZEROS = bytes(1 << 16)


def take_room(file: int, start: int, end: int) -> None:
    """See to it that writing bytes `start` to `end`, which lie beyond the file's content, needs no more room.

    The file keeps its size; where the file system cannot take room so, zeros are written there, which readers of a
    journal take for nothing. OSError, ENOSPC for one, where there is no room.
    """
    try:
        if allocate := _fallocate():
            allocate(file, start, end - start)
            return
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    while start < end:
        start += os.pwrite(file, _ZEROS[: end - start], start)


def give_room_back(file: int, end: int) -> None:
    """Free what was taken beyond byte `end`."""
    os.ftruncate(file, end)


@cache
def _fallocate() -> Callable[[int, int, int], None] | None:
    """fallocate of the C library with FALLOC_FL_KEEP_SIZE, which Python's `os` lacks; None where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def allocate(file: int, start: int, nbytes: int) -> None:
        while function(file, _KEEP_SIZE, start, nbytes) != 0:
            if (code := ctypes.get_errno()) != errno.EINTR:
                raise OSError(code, os.strerror(code))

    return allocate
