"""One rank as the frontend holds it: a process with a name, and the channel to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gradwire_workers.rank_channel import Answer, RankChannel

_SECONDS_TO_DIE = 5.0


class RankProcess:
    """A rank that serves. `owner`: whom it has served; None when nobody yet. `end`: ends the process of that name."""

    def __init__(self, channel: RankChannel, *, process_id: int, end: Callable[[RankProcess], Awaitable[None]]) -> None:
        self.name = channel.name
        self.process_id = process_id
        self.owner: str | None = None
        self.channel = channel
        self._end = end
        self._ending: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.channel.lost is None and self._ending is None

    def call(self, kind: str, fields: Mapping[str, Any] | None = None) -> asyncio.Future[Answer]:
        """See `RankChannel.call`."""
        return self.channel.call(kind, fields)

    def kill(self) -> asyncio.Task[None]:
        """Ends the process, whatever it is doing. The task is done when it is gone."""
        if self._ending is None:
            self.channel.close()
            self._ending = asyncio.ensure_future(self._end(self))  # type: ignore[assignment]
        return self._ending  # type: ignore[return-value]


def wait_until_gone(process_id: int) -> None:
    """Blocks until the process has ended, but not for ever. Returns at once for one that is not on this machine."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process_id)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(_SECONDS_TO_DIE * 1000)
        finally:
            os.close(descriptor)
