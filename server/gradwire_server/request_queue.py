"""Requests that take turns: their tensors resolved, their times told, their errors fit for clients."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from gradwire_proto.errors import GradwireError
from gradwire_server.calls import Call
from gradwire_server.failures import public_error
from gradwire_server.replies import with_times
from gradwire_server.uploads import Uploads
from gradwire_server.work_queue import Job, WorkQueue

T = TypeVar("T")


class RequestQueue:
    """Runs requests one at a time, in the order of arrival. At most `limit`, the setting requests_per_model."""

    def __init__(self, uploads: Uploads, limit: int) -> None:
        self._uploads = uploads
        self._queue = WorkQueue(limit, "requests_per_model")

    def submit(self, call: Call, tensors: Any, work: Callable[[Any], Awaitable[T]]) -> Job[T]:
        """Let `work(tensors)` run in its turn, with the handles in `tensors` (nested) resolved.

        Raises ResourceExhausted QUEUE_FULL and ModelNotFound UPLOAD_NOT_FOUND. Handles of work that never begins stay
        good.
        """
        self._queue.check_room()
        claim = self._uploads.claim(tensors)
        submitted = time.monotonic()

        async def run() -> T:
            queued = time.monotonic() - submitted
            try:
                return with_times(await work(claim.value), call, queued)
            except Exception as error:
                raise public_error(error, call.request_id) from None
            finally:
                claim.spend()

        return self._queue.submit(run, claim.give_back)

    async def idle(self) -> None:
        """Return when nothing waits or runs."""
        await self._queue.idle()

    async def close(self, error: GradwireError) -> None:
        """Refuse what waits and what still comes with `error`; return when what runs has ended."""
        await self._queue.close(error)
