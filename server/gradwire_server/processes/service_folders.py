"""The folders of one service: made at its start, gone at its end, but for the logs of a storage that was named."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradwire_server.config import ConfigError

# Ray puts Unix sockets up to 68 bytes below, and a socket's path ends at 107.
_LONGEST_PARENT = 20


@dataclass(frozen=True, kw_only=True)
class ServiceFolders:
    """Where a service keeps what must not outlive it, in two folders that are 0700, and its log files.

    runtime: sockets, tokens, Ray's session. shared_memory: tensors on their way between processes. logs: in the
    storage, where the user named one, and then they stay; in the runtime folder otherwise. storage: that one, or one in
    the runtime folder, which outlives Ray and frontends but not the service.
    """

    runtime: Path
    shared_memory: Path
    logs: Path
    storage: Path

    @classmethod
    def create(cls, service: str, storage: Path | None) -> ServiceFolders:
        """Make the folders of the service with that id."""
        parent = tempfile.gettempdir()
        runtime = Path(parent if len(parent) <= _LONGEST_PARENT else "/tmp") / f"gradwire-{service}"
        shared = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else runtime) / f"gradwire-{service}"
        logs = log_folder(storage) if storage else runtime / "logs"
        folders = cls(runtime=runtime, shared_memory=shared, logs=logs, storage=storage or runtime / "storage")
        for folder in (runtime, shared, folders.frontend):
            folder.mkdir(mode=0o700)
        folders.storage.mkdir(mode=0o700, exist_ok=True)
        logs.mkdir(exist_ok=True)
        return folders

    @property
    def frontend(self) -> Path:
        """The frontend's own: its sockets and rendezvous files."""
        return self.runtime / "frontend"

    @property
    def template(self) -> Path:
        """The socket of the process that Ray's workers are forked from."""
        return self.runtime / "template.sock"

    @property
    def ray(self) -> Path:
        """Ray's temporary folder."""
        return self.runtime / "ray"

    @property
    def ray_log(self) -> Path:
        """What `ray start` prints. The files that Ray's processes write come beside it when they end."""
        return self.logs / "ray.log"

    def clear_for_restart(self) -> None:
        """Delete what processes that are dead now have left, the logs excepted."""
        self._keep_ray_logs()
        for folder in (self.ray, self.frontend, self.shared_memory):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.frontend, self.shared_memory):
            folder.mkdir(mode=0o700)

    def remove(self) -> None:
        """Delete everything but logs in a storage that the user named. Folders that are gone already are fine."""
        self._keep_ray_logs()
        for folder in (self.shared_memory, self.runtime):
            shutil.rmtree(folder, ignore_errors=True)

    def _keep_ray_logs(self) -> None:
        # Ray writes them into its session, whose path must be short.
        if self.logs.is_relative_to(self.runtime):
            return
        for session in self.ray.glob("session_2*"):
            with suppress(OSError):  # A full disk must not keep the service from ending.
                shutil.copytree(session / "logs", self.logs / session.name, dirs_exist_ok=True)


def log_folder(storage: Path) -> Path:
    """The folder of a storage's log files, made if it is missing. Raises ConfigError."""
    folder = storage / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"storage: {storage} cannot be written to ({error.strerror}: {error.filename}); name a folder that user"
            f" {os.getuid()} may write to"
        ) from None
    return folder
