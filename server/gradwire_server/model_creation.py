"""A model that is being made, for as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine
from typing import Any

from gradwire_proto.errors import Cancelled, GradwireError
from gradwire_proto.values import ModelInfo
from gradwire_server.failures import public_error


class ModelCreation:
    """Runs `make()`, which returns the new model's description, until the last caller gives up.

    `make` leaves nothing behind when it fails or is cancelled. `ended` is called with the creation in any case, before
    those who wait are woken.
    """

    def __init__(
        self,
        model_id: str,
        request_id: str | None,
        make: Callable[[], Coroutine[Any, Any, ModelInfo]],
        ended: Callable[[ModelCreation], None],
    ) -> None:
        self.model_id = model_id
        self.error: GradwireError | None = None
        self._result: ModelInfo | None = None
        self._given_up: GradwireError | None = None
        self._waiters = 0
        self._task = asyncio.get_running_loop().create_task(self._run(make, request_id))
        self._task.add_done_callback(lambda _: self._end(ended))

    @property
    def ended(self) -> bool:
        """Whether the model is there, or will not be."""
        return self._task.done()

    async def _run(self, make: Callable[[], Coroutine[Any, Any, ModelInfo]], request_id: str | None) -> None:
        try:
            self._result = await make()
        except Exception as error:
            self.error = copy.copy(public_error(error, request_id))
            self.error.outcome = "not_applied"

    def _end(self, ended: Callable[[ModelCreation], None]) -> None:
        if self._task.cancelled():
            self.error = self._given_up or Cancelled(
                "the model was not created: its caller gave up, or somebody deleted it"
            )
        ended(self)

    async def result(self, deadline: float | None) -> ModelInfo:
        """Wait for the model. If every caller that waits is cancelled, so is the creation: `deadline` is theirs."""
        self._waiters += 1
        try:
            await self.wait()
        except asyncio.CancelledError:
            if self._waiters == 1:
                self._task.cancel()
            raise
        finally:
            self._waiters -= 1
        if self.error is not None:
            raise copy.copy(self.error)
        assert self._result is not None
        return self._result

    async def wait(self) -> None:
        """Wait for the end, without wanting the model."""
        await asyncio.wait([self._task])

    def give_up(self, why: GradwireError) -> None:
        """End it; whoever waits for the model gets this error."""
        self._given_up = why
        self._task.cancel()

    async def cancel(self) -> None:
        """Give it up; returns when it has ended."""
        self._task.cancel()
        await self.wait()
