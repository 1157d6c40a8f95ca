"""A model that is brought back, as those see it who do so."""

from __future__ import annotations

from typing import Protocol

from gradwire_proto.errors import GradwireError
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.stored_replies import EndedCommand
from gradwire_server.workers import Workers


class Restored(Protocol):
    """See the module."""

    @property
    def id(self) -> str: ...

    @property
    def number(self) -> int:
        """That of the last command that was applied."""
        ...

    @property
    def spec(self) -> CurrentSpec:
        """The model's spec as of the last command."""
        ...

    @property
    def journal(self) -> Journal | None: ...

    def goes_back_to(self, saved: SavedModel, spec: CurrentSpec) -> None:
        """What follows is applied to this checkpoint."""
        ...

    def takes_journal(self, journal: Journal) -> None:
        """Commands are recorded here."""
        ...

    def adopt(self, workers: Workers, trained: tuple[str, ...]) -> None:
        """Commands run on these ranks. trained: the parameters that they train."""
        ...

    def waits_for(self, error: GradwireError) -> None:
        """It cannot be brought back yet, because of this."""
        ...

    async def release_again(self, names: tuple[str, ...]) -> None:
        """Let go of retained forwards, as was done before."""
        ...

    async def let_go_of_datasets(self) -> None:
        """Have the ranks let go of what fits have mapped: a file that is mapped takes room even when it is removed."""
        ...

    def wants_answer(self, entry: Entry) -> bool:
        """Whether somebody may still ask what this command answered, and it is not known here."""
        ...

    def applied_again(self, entry: Entry, ended: EndedCommand) -> None:
        """This command of the journal was applied once more."""
        ...
