"""One part of the service looked at again and again, in the background."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

from gradwire_server.health.readiness import Readiness

EVERY_SECONDS = 2.0
"""How long after one look the next follows."""

PATIENCE_SECONDS = 3.0
"""How long a look may take before the part counts as missing."""


class PartWatch:
    """`look` blocks, and raises what tells why the part is not ready. One runs at a time, in a thread, however long.

    hangs: the words for a look that does not end.
    """

    def __init__(
        self,
        readiness: Readiness,
        part: str,
        look: Callable[[], object],
        hangs: str,
        *,
        every: float = EVERY_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._readiness = readiness
        self._part = part
        self._look = look
        self._hangs = hangs
        self._every = every
        self._patience = patience
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with a look at once."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """No more. A look that does not end is left to itself."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            looking = asyncio.wrap_future(_in_thread(self._look))
            ended, _ = await asyncio.wait([looking], timeout=self._patience)
            if not ended:
                self._readiness.set(self._part, f"{self._hangs} (no answer within {self._patience:g} s)")
                await asyncio.wait([looking])
            error = looking.exception()
            self._readiness.set(self._part, None if error is None else str(error) or type(error).__name__)
            await asyncio.sleep(self._every)


def _in_thread(function: Callable[[], object]) -> Future[object]:
    # A daemon, and no executor's: the process must not wait at its end for what never returns.
    answer: Future[object] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="gradwire-health", daemon=True).start()
    return answer
