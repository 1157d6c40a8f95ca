"""Files that are there whole or not at all, also after a power loss."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def sync_folder(folder: Path) -> None:
    """fsync of a folder: the names in it are durable then, and those removed from it stay away."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """fsync of a file that is there, whoever wrote to it."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file; where the file system has no links, copy it. It is not yet durable under its new name."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)  # By sendfile, inside the kernel.


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` that content at once and durably: a temporary file, fsynced, renamed, and the folder fsynced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
