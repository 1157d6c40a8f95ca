"""The folders that only this service may read: one for sockets, one in shared memory for tensors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradwire_server.config import ConfigError

SHARED_MEMORY = "/dev/shm"


@contextmanager
def private_folder(setting: str, path: Path | None, parent: str | None = None) -> Iterator[Path]:
    """`path`, made if it is missing and checked to be this user's alone; where None, a new folder in `parent` that is
    removed at the end. ConfigError names `setting`.
    """
    if path is None:
        folder = Path(tempfile.mkdtemp(prefix="gradwire-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{setting}: {error.strerror}: {path}") from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(f"{setting}: should belong to this user alone (mode 0700): {path}")
    yield path
