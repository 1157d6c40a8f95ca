"""The Ray shell around a rank: it starts the process, says where the rank listens, and knows nothing else."""

from __future__ import annotations

import os
from typing import Any

from gradwire_workers.kept_memory import keep_freed_memory


class RankActor:
    """A process that waits, with torch imported, for a model. Commands come over ZeroMQ, never through Ray."""

    def __init__(self, name: str, folder: str, memory_folder: str, patience: float) -> None:
        self._name = name
        self._folder = folder
        self._memory_folder = memory_folder
        self._patience = patience

    def serve(self) -> dict[str, Any]:
        """Imports torch, warms up and starts serving. Returns the endpoint and the process id."""
        keep_freed_memory()
        # Torch belongs to the rank's process, not to whoever imports this module to start one.
        from gradwire_workers.rank_commands import RankCommands
        from gradwire_workers.rank_server import RankServer

        endpoint = f"ipc://{self._folder}/{self._name}.sock"
        commands = RankCommands(self._name, self._memory_folder)
        RankServer(endpoint, commands, patience=self._patience).start()
        return {"endpoint": endpoint, "process_id": os.getpid()}
