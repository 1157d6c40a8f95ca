"""Files that are there whole or not at all, also after a power loss."""

from __future__ import annotations

import os
from pathlib import Path


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
