"""The private folders of one service: made at its start, gone at its end."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Ray puts Unix sockets up to 68 bytes below, and a socket's path ends at 107.
_LONGEST_PARENT = 20


@dataclass(frozen=True, kw_only=True)
class ServiceFolders:
    """Where a service keeps what must not outlive it. Both folders are 0700.

    runtime: sockets, tokens, logs, Ray's session, and the storage where the user named none.
    shared_memory: tensors on their way between processes.
    """

    runtime: Path
    shared_memory: Path

    @classmethod
    def create(cls, service: str) -> ServiceFolders:
        """Make the folders of the service with that id."""
        parent = tempfile.gettempdir()
        runtime = Path(parent if len(parent) <= _LONGEST_PARENT else "/tmp") / f"gradwire-{service}"
        shared = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else runtime) / f"gradwire-{service}"
        folders = cls(runtime=runtime, shared_memory=shared)
        for folder in (runtime, shared, folders.frontend):
            folder.mkdir(mode=0o700)
        return folders

    @property
    def frontend(self) -> Path:
        """The frontend's own: its sockets and rendezvous files."""
        return self.runtime / "frontend"

    @property
    def ray(self) -> Path:
        """Ray's temporary folder."""
        return self.runtime / "ray"

    @property
    def storage(self) -> Path:
        """The storage of a service that was given none."""
        return self.runtime / "storage"

    def clear_for_restart(self) -> None:
        """Delete what processes that are dead now have left, the storage excepted."""
        for folder in (self.ray, self.frontend, self.shared_memory):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.frontend, self.shared_memory):
            folder.mkdir(mode=0o700)

    def remove(self) -> None:
        """Delete everything. Folders that are gone already are fine."""
        for folder in (self.shared_memory, self.runtime):
            shutil.rmtree(folder, ignore_errors=True)
