"""A rank in a process of its own, without Ray. `python rank.py ENDPOINT MEMORY_FOLDER NAME`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradwire_workers.rank_commands import RankCommands
from gradwire_workers.rank_server import RankServer


class Told(RankCommands):
    """After the command that a file names, and before it answers, it ends or takes its time, as the file says."""

    def __init__(self, name: str, memory_folder: str, told: Path) -> None:
        super().__init__(name, memory_folder)
        self._told = told

    def answer(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = super().answer(kind, fields)
        if self._told.exists():
            command, what = self._told.read_text().split()
            if command == kind and what == "ends":
                os._exit(1)
            elif command == kind:
                time.sleep(float(what))
        return answer


if __name__ == "__main__":
    endpoint, memory_folder, name = sys.argv[1:]
    told = Path(endpoint.removeprefix("ipc://")).with_suffix(".told")
    RankServer(endpoint, Told(name, memory_folder, told), patience=60).start()
    print("serving", flush=True)
    time.sleep(3600)
