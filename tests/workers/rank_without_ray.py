"""A rank's process in which Ray cannot be imported, and in which a step that touches pickle is an error.

`python rank_without_ray.py ENDPOINT MEMORY_FOLDER`. The actor does the same in its `serve`, which is not on the path
of a step.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Mapping
from typing import Any

from tripwire import tripwire

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.rank_server import Commands, RankServer

OFF_THE_HOT_PATH = ("load", "start", "check_rows")


class Watched:
    """The rank's commands, with a tripwire around those of a step."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    @property
    def needs_rejoin(self) -> bool:
        return self._commands.needs_rejoin

    def answer(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        if kind in OFF_THE_HOT_PATH:
            return self._commands.answer(kind, fields)
        with tripwire() as trips:
            answer = {} if kind == "pickle" else self._commands.answer(kind, fields)
            if kind == "pickle":
                pickle.dumps(fields)
        if trips:
            raise InvalidArgument(f"{kind} called {', '.join(trips)}", reason="TRIPPED")
        return answer


def main(endpoint: str, memory_folder: str) -> None:
    sys.modules["ray"] = None  # type: ignore[assignment]
    from gradwire_workers.rank_commands import RankCommands

    RankServer(endpoint, Watched(RankCommands("rank-x", memory_folder)), patience=60).start()
    print("serving", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
