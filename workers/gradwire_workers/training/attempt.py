"""A command on one rank as all or nothing, together with the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from gradwire_workers.process_group import ProcessGroups, peer_failed
from gradwire_workers.training.failures import as_program_failure
from gradwire_workers.training.snapshots import Snapshot

AGREED = frozenset({"LOSS_NOT_FINITE", "GRADIENT_NOT_FINITE", "SCHEDULE_FAILED", "RETAINED_BYTES"})
"""Refusals that every rank makes by itself, of numbers that all ranks share: nobody has to be told."""


class Attempt:
    """Inside, a command may change `tensors`; if it raises, they are put back and the other ranks fail too.

    changes=False: they are put back in any case. Errors of the client's program come out as InvalidArgument; where
    another rank failed first, as InternalError PEER_FAILED.
    """

    def __init__(self, groups: ProcessGroups | None, tensors: Sequence[Tensor], *, changes: bool = True) -> None:
        self._groups = groups
        self._tensors = tensors
        self._changes = changes
        self._snapshot: Snapshot | None = None

    def __enter__(self) -> None:
        if self._groups is not None and self._groups.failed:
            raise peer_failed("it failed before this command, and has not rejoined")
        if not self._tensors:
            return
        try:
            self._snapshot = Snapshot(self._tensors)
        except BaseException as error:
            # No memory for copies: the others are on their way to a collective, and must not wait in it.
            if self._groups is not None:
                self._groups.abort(f"{type(error).__name__}: {error}")
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and (self._changes or self._snapshot is None):
            return
        if self._snapshot is not None:
            self._snapshot.restore()
        if error is None:
            return
        if getattr(error, "reason", None) in AGREED:
            return
        if self._groups is not None:
            a_peer_was_first = self._groups.failed
            self._groups.abort(f"{type(error).__name__}: {error}")
            if a_peer_was_first:
                raise peer_failed(error) from error
        explained = as_program_failure(error)
        if explained is not error:
            raise explained from error
