"""A rank in a process of its own, without Ray. `python rank.py ENDPOINT MEMORY_FOLDER NAME`."""

from __future__ import annotations

import sys
import time

from gradwire_workers.rank_commands import RankCommands
from gradwire_workers.rank_server import RankServer

if __name__ == "__main__":
    endpoint, memory_folder, name = sys.argv[1:]
    RankServer(endpoint, RankCommands(name, memory_folder), patience=60).start()
    print("serving", flush=True)
    time.sleep(3600)
