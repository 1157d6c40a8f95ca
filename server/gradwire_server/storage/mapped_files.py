"""Files as parts of memory, after all their bytes were read once: of a mapping, what a disk cannot read is no error but
ends the process."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from gradwire_server.storage.storage_errors import journal_corrupt, storage_error

_PIECE_BYTES = 1 << 20


def mapped(path: Path) -> memoryview:
    """The file's bytes, which live as long as anything that refers to them does.

    FailedPrecondition JOURNAL_CORRUPT where the disk does not give some of them; errors of `storage_error`.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            _read_once(path, file.fileno())
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    except OSError as error:
        raise storage_error(error, f"read {path}") from error


def _read_once(path: Path, file: int) -> None:
    buffer, offset = bytearray(_PIECE_BYTES), 0
    try:
        while count := os.preadv(file, [buffer], offset):
            offset += count
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise unreadable(path, offset) from error


def unreadable(path: Path, offset: int = 0) -> Exception:
    """The error of bytes at or behind `offset` that the disk does not give."""
    return journal_corrupt(path, offset, "the disk cannot read what is here or soon behind")
