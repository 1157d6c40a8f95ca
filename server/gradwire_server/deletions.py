"""What is deleted: each thing once, whoever asks, and for each request once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_server.calls import Call
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.deletion_notes import DeletionNotes
from gradwire_server.storage.saved_model import StoredReply
from gradwire_server.stored_replies import EndedCommand, stored_reply_of
from gradwire_server.tensors.file_threads import in_thread

logger = logging.getLogger(__name__)


class Deletion:
    """What one request has begun, or joined. It goes on without its callers."""

    error: GradwireError | None = None

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._task.done()

    async def wait(self) -> None:
        """Wait for its end."""
        await asyncio.wait([self._task])

    async def result(self, deadline: float | None) -> Any:
        """Wait for its end. Raises what it failed of."""
        await asyncio.shield(self._task)


class Deletions:
    """See the module. `log` is told of the requests of `method`.

    A request that has succeeded is noted in the storage before it is answered. Its repeat leaves alone what was made
    under the same name since, after a restart of the service too. One that has failed is forgotten.
    """

    def __init__(self, method: str, log: RequestLog[Any], notes: DeletionNotes) -> None:
        self._method = method
        self._log = log
        self._notes = notes
        self._running: dict[str, asyncio.Task[None]] = {}
        self._noting: set[asyncio.Task[None]] = set()

    def restore(self, notes: Iterable[StoredReply]) -> None:
        """These requests were answered by an earlier process of the service."""
        for note in notes:
            if note.method == self._method:
                self._log.restore(note.request_id, note.body, EndedCommand(0, note.method, b""), note.ended_at)

    async def is_repeated(self, call: Call) -> bool:
        """Whether `call` repeats a request that has succeeded, once it has. Raises what that fails of."""
        found = self._log.find(call)
        if isinstance(found, Deletion):
            await found.result(call.deadline)
        return found is not None

    async def run(self, name: str, delete: Callable[[], Coroutine[Any, Any, None]], call: Call) -> None:
        """Wait until `delete()`, or the one that runs for the same name, has ended."""
        if name not in self._running:
            running = self._running[name] = asyncio.create_task(delete())
            running.add_done_callback(lambda _: self._running.pop(name))
        noting = asyncio.create_task(self._note(self._running[name], call))
        self._noting.add(noting)
        noting.add_done_callback(self._noted)
        deletion = Deletion(noting)
        self._log.add(call, deletion)
        await deletion.result(call.deadline)

    async def _note(self, running: asyncio.Task[None], call: Call) -> None:
        try:
            await running
            if call.request_id is not None:
                ended = EndedCommand(0, call.method, b"")
                await self._write(stored_reply_of(call.request_id, call.body, ended, time.time()))
                self._log.add(call, ended)
        except BaseException:
            self._log.forget(call)
            raise

    async def _write(self, note: StoredReply) -> None:
        try:
            await in_thread(self._notes.write, note)
        except FailedPrecondition:
            raise
        except GradwireError as error:
            # It is gone all the same, and until the service is started again its repeat is known.
            logger.warning("%s", error)

    def _noted(self, noting: asyncio.Task[None]) -> None:
        self._noting.discard(noting)
        if not noting.cancelled():
            noting.exception()  # Its callers may be gone.

    async def close(self) -> None:
        """Wait for those that run."""
        await asyncio.gather(*self._noting, return_exceptions=True)
