"""The ranks that compute functions: one for each owner who has any, and no more of them than there may be."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from gradwire_workers.function_rank import FunctionRank

MOST = 8
"""Each is a process. Beyond, that of the owner who has not asked for longest ends, if it is not at work."""


class FunctionRanks:
    """See the module. make: one for an owner, which takes its process when the first function comes."""

    def __init__(self, make: Callable[[str], FunctionRank]) -> None:
        self._make = make
        self._ranks: OrderedDict[str, FunctionRank] = OrderedDict()

    def of(self, owner: str) -> FunctionRank:
        """The owner's."""
        rank = self._ranks.get(owner)
        if rank is None:
            self._make_room()
            rank = self._ranks[owner] = self._make(owner)
        self._ranks.move_to_end(owner)
        return rank

    def _make_room(self) -> None:
        for owner, rank in list(self._ranks.items()):
            if len(self._ranks) < MOST:
                break
            if not rank.is_busy:
                del self._ranks[owner]
                rank.drop()

    async def close(self) -> None:
        """Give all up, whatever they compute."""
        await asyncio.gather(*(rank.close() for rank in self._ranks.values()))
