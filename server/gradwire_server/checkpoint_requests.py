"""What became of the requests for checkpoints of one model, since the service started."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

from gradwire_proto.errors import Cancelled, GradwireError, InvalidArgument
from gradwire_proto.values import Checkpoint
from gradwire_server.failures import public_error

_KNOWN_REQUESTS = 1024


class Saving:
    """A checkpoint that was asked for, and is taken whoever waits. `error`: why it was not, once it has ended."""

    def __init__(self, name: str, request_id: str | None, work: Coroutine[Any, Any, Checkpoint]) -> None:
        self.name = name
        self.error: GradwireError | None = None
        self.ended = False
        self._request_id = request_id
        self._checkpoint: Checkpoint | None = None
        self._over = asyncio.Event()
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(self._end)

    def _end(self, task: asyncio.Future[Checkpoint]) -> None:
        if task.cancelled():
            self.error = Cancelled("the service stopped", outcome="unknown")
        elif (error := task.exception()) is not None:
            # A copy: a raised error holds on to its frames, and they to what was saved.
            self.error = copy.copy(public_error(error, self._request_id, outcome="unknown"))
        else:
            self._checkpoint = task.result()
        self.ended = True
        self._over.set()

    async def wait(self) -> None:
        """Wait for the end."""
        await self._over.wait()

    async def result(self) -> Checkpoint:
        """The checkpoint. Raises why there is none."""
        await self.wait()
        if self._checkpoint is None:
            assert self.error is not None
            raise copy.copy(self.error)
        return self._checkpoint


class CheckpointRequests:
    """See the module. The last 1024 with an id are known: a repeat gets the answer of one that runs or did not fail."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Saving] = OrderedDict()

    def find(self, request_id: str | None, name: str) -> Saving | None:
        """The request that one with this id repeats; None where it is to be tried.

        InvalidArgument REQUEST_ID_REUSED where that was for another name.
        """
        known = self.get(request_id)
        if known is not None and known.name != name:
            raise InvalidArgument(
                f"{request_id} was the id of another request; each needs its own",
                field="request_id",
                reason="REQUEST_ID_REUSED",
            )
        return known if known is not None and known.error is None else None

    def get(self, request_id: str | None) -> Saving | None:
        """The last request with this id, whatever its name."""
        return None if request_id is None else self._known.get(request_id)

    def add(self, request_id: str | None, saving: Saving) -> None:
        """Remember a request, if it has an id."""
        if request_id is None:
            return
        self._known[request_id] = saving
        if len(self._known) > _KNOWN_REQUESTS:
            self._known.popitem(last=False)
