"""The model of a group that has lost a rank, from one that is left: if there is one that is whole and up to date.

A rank that waits for a lost one in a collective fails it as soon as the lost one's process is gone, puts back what the
command had changed, and answers. One that had got through the command already is a source where its answer was enough
to count the command as applied (see `Ranks.call`); else it is ahead of what was counted. One that failed inside its
update is torn, and one that computes for long does not answer in time: none of these is a source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gradwire_proto.errors import RankLost
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.ranks import Ranks

_SECONDS_TO_ANSWER = 1.5
# A rank that answers is well; how long its state takes is a matter of size.
_SECONDS_TO_READ = 60.0

Fields = Mapping[str, Any]


async def salvage(ranks: Ranks, applied: int) -> tuple[Fields, list[Any]] | None:
    """(the whole state of a rank that applied just so many commands, each rank's held gradients); None: none has."""
    processes = ranks.processes
    for process in processes:
        if process.channel.lost is not None:
            process.kill()
    asked = [_answer(each, "standing", {}, _SECONDS_TO_ANSWER) for each in processes]
    standings = await asyncio.gather(*asked)
    sources = [
        process
        for process, standing in zip(processes, standings, strict=True)
        if standing is not None and standing["applied"] == applied and not standing["torn"]
    ]
    holds = any(standing["holds"] for standing in standings if standing is not None)
    if not sources or (holds and len(sources) < len(processes)):
        # What a lost rank held of the gradients, no other knows.
        return None
    for source in sources:
        whole = await _answer(source, "state", {"whole": True}, _SECONDS_TO_READ)
        if whole is None:
            continue
        if not holds:
            return whole, [None for _ in processes]
        of_ranks = [await _answer(each, "state", {"whole": False}, _SECONDS_TO_READ) for each in processes]
        parts = [each["held"] for each in of_ranks if each is not None]
        return (whole, parts) if len(parts) == len(processes) else None
    return None


async def _answer(process: RankProcess, kind: str, fields: Fields, seconds: float) -> Fields | None:
    """What the rank answers; None where it does not, or not in time."""
    if not process.alive:
        return None
    try:
        answer = await asyncio.wait_for(process.call(kind, fields), seconds)
    except (RankLost, TimeoutError):
        return None
    return answer.fields if answer.error is None else None
