"""Files that the service lends to a client to read, and that ranks write to again once nobody has them any more.

Fresh pages of memory cost more than the bytes that are written to them. A file that is lent gets another name, from
which whoever made it may take it back: only where the kernel says that no process has it open or mapped, a fork of the
client neither. So nobody is trusted to give anything back, and what a client keeps never changes under its hands.
"""

from __future__ import annotations

import fcntl
import os

_SUFFIX = ".lent"


def lend(path: str) -> str:
    """Give the file at `path` the name of one that is lent; returns it. Whoever is to read it has it open already."""
    os.rename(path, path + _SUFFIX)
    return path + _SUFFIX


def is_unused(descriptor: int) -> bool:
    """Whether nobody but this descriptor has the file. False too where the kernel cannot tell."""
    try:
        # A lease to write is given to whoever has the only open descriptor; mappings and forks count as such.
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


def take_back(path: str, size: int, new_path: str) -> int | None:
    """A descriptor to write to the file that was made at `path` and lent since, under its new name; None: it cannot be.

    size: bytes that it must have room for without growing; one of more than four times as many is left alone. What it
    has beyond them goes: nobody is to read there what somebody else was lent.
    """
    try:
        descriptor = os.open(path + _SUFFIX, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if size <= os.fstat(descriptor).st_size <= 4 * size and is_unused(descriptor):
            os.ftruncate(descriptor, size)
            os.rename(path + _SUFFIX, new_path)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
