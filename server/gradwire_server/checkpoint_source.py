"""A model as its Checkpointer sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gradwire_server.storage.journal import Journal
from gradwire_server.storage.saved_model import SavedModel


class CheckpointSource:
    """See SavableModel. `number`, `journal`: as they are now; `capture`: the model in its turn."""

    def __init__(
        self,
        model_id: str,
        number: Callable[[], int],
        journal: Callable[[], Journal | None],
        capture: Callable[[bool], Awaitable[SavedModel | None]],
    ) -> None:
        self.model_id = model_id
        self._number = number
        self._journal = journal
        self._capture = capture
        self._loop = asyncio.get_running_loop()

    @property
    def number(self) -> int:
        """The number of the last command that was applied."""
        return self._number()

    @property
    def journal(self) -> LoopJournal | None:
        """Where commands are recorded; None: nowhere."""
        journal = self._journal()
        return None if journal is None else LoopJournal(journal, self._loop)

    def capture(self, *, automatic: bool) -> Awaitable[SavedModel | None]:
        """See SavableModel."""
        return self._capture(automatic)


class LoopJournal:
    """A journal for other threads than the event loop's, which alone writes to it."""

    def __init__(self, journal: Journal, loop: asyncio.AbstractEventLoop) -> None:
        self._journal = journal
        self._loop = loop

    def size_after(self, number: int) -> int:
        """Bytes behind command `number`. For the event loop's thread."""
        return self._journal.size_after(number)

    def cut(self, number: int) -> None:
        """See Journal.cut. For any other thread."""
        asyncio.run_coroutine_threadsafe(self._cut(number), self._loop).result()

    async def _cut(self, number: int) -> None:
        self._journal.cut(number)
