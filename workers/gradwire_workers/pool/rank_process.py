"""One rank as the frontend holds it: a process with a name, and the channel to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from gradwire_workers.frames import Encoded
from gradwire_workers.rank_channel import Answer, RankChannel
from gradwire_workers.step_rows import StepRow


class ProcessHandle:
    """A process of this node that is sure to be the one it was, whoever gets its number later."""

    def __init__(self, process_id: int) -> None:
        """For a process that is there, or has just gone."""
        self._descriptor: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._descriptor = os.pidfd_open(process_id)

    def kill(self) -> None:
        """Ends it, stopped or not. Nothing happens if it is gone."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def gone(self, *, timeout: float) -> bool:
        """Whether it has ended, or does within so many seconds."""
        if self._descriptor is None:
            return True
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._descriptor, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), timeout)
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._descriptor)
        return True

    def close(self) -> None:
        """Lets go of it. Nothing else may be called after it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


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

    def call(
        self,
        kind: str,
        fields: Mapping[str, Any] | Encoded | None = None,
        take: Callable[[list[StepRow]], None] | None = None,
    ) -> asyncio.Future[Answer]:
        """See `RankChannel.call`."""
        return self.channel.call(kind, fields, take)

    def kill(self) -> asyncio.Task[None]:
        """Ends the process, whatever it is doing; calls that wait for it end with RankLost. Done when it is gone."""
        if self._ending is None:
            self.channel.on_lost = None
            self._ending = self._end(self)
        return self._ending
