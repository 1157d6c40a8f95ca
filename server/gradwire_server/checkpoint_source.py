"""A model as its Checkpointer sees it."""

from __future__ import annotations

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

    @property
    def number(self) -> int:
        """The number of the last command that was applied."""
        return self._number()

    @property
    def journal(self) -> Journal | None:
        """Where commands are recorded; None: nowhere."""
        return self._journal()

    def capture(self, *, automatic: bool) -> Awaitable[SavedModel | None]:
        """See SavableModel."""
        return self._capture(automatic)
