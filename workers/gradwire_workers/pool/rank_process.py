"""One rank as the frontend holds it: a process with a name, and the channel to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Callable, Mapping
from typing import Any

from gradwire_workers.rank_channel import Answer, RankChannel


class RankProcess:
    """A rank that serves. `owner`: whom it has served; None when nobody yet. `end`: ends it."""

    def __init__(
        self, channel: RankChannel, *, process_id: int, end: Callable[[RankProcess], asyncio.Task[None]]
    ) -> None:
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
        """Ends the process, whatever it is doing; calls that wait for it end with RankLost. Done when it is gone."""
        if self._ending is None:
            self.channel.on_lost = None
            self._ending = self._end(self)
        return self._ending


def wait_until_gone(process_id: int, *, timeout: float) -> None:
    """Blocks until the process has ended, at most so many seconds. Returns at once for one that is not there."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process_id)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(timeout * 1000)
        finally:
            os.close(descriptor)
