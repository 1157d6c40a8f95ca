"""When a model is saved by itself, and what is asked of it and of the store for that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from gradwire_proto.values import Checkpoint
from gradwire_server.storage.saved_model import SavedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """When a model is saved by itself: after so many commands, bytes of journal or seconds, whatever comes first.

    keep: how many of these checkpoints are kept.
    """

    commands: int
    journal_bytes: int
    seconds: float
    keep: int

    def __post_init__(self) -> None:
        for name in ("commands", "journal_bytes", "seconds", "keep"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)!r}")


class CutJournal(Protocol):
    """What is asked of a model's journal."""

    def size_after(self, number: int) -> int:
        """Bytes behind command `number`."""
        ...

    def cut(self, number: int) -> Callable[[], None]:
        """Forget what is needed for nothing behind command `number`. Called in the event loop, as appending is.

        What it returns removes that, and is called in a thread.
        """
        ...


class SavableModel(Protocol):
    """A model that can be saved. `number`: of its last command; `journal`: None where it has none."""

    @property
    def model_id(self) -> str: ...

    @property
    def number(self) -> int: ...

    @property
    def journal(self) -> CutJournal | None: ...

    def capture(self, *, automatic: bool) -> Awaitable[SavedModel | None]:
        """The model as it is in its turn, between two commands. The turn is that of this call, not of its awaiting.

        The files are the caller's. None for an automatic one while forwards are retained, for what comes behind it
        could not be done again, and while the model is ahead of its journal, for it may go back. A named one raises the
        GradwireError that says why there is none, such as that the commands in it could not be made durable. Of the
        result, `name`, `created_at` and `request_id` are not looked at.
        """
        ...


class Checkpoints(Protocol):
    """Where they are kept: CheckpointStore. Calls block."""

    def write(self, key: str, saved: SavedModel) -> Checkpoint: ...

    def delete(self, key: str) -> None: ...
