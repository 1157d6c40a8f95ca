"""A model's ranks brought back to where it was: from a rank that is left, or from a checkpoint and the journal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from gradwire_proto.errors import FailedPrecondition, RankLost, Unavailable
from gradwire_proto.values import ModelState
from gradwire_server.checkpoint_reading import read_newest
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.failures import may_pass, public_error
from gradwire_server.model_storage import ModelStorage
from gradwire_server.replaying import Replayer, apply_again
from gradwire_server.restored_model import Restored
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import state_files
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.tensors.held_files import remove_files
from gradwire_server.workers import Cluster, Workers

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a model fails to come back for another reason than that ranks, or the storage, are not there.

A checkpoint that is read may be replaced meanwhile. What fails each time is to blame.
"""

LOSSES = 8
"""How often a model's ranks are lost, one time after the other, at one command of its journal: that is to blame then.

Else they are lost by chance. The command was applied once, and where memory is short for a while it may be again: that
takes 15 s at least.
"""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two attempts to find ranks, or storage, that were not there."""


class Restorer:
    """Finds ranks for one model. `storage` None: of a model that outlives nothing."""

    def __init__(self, model: Restored, cluster: Cluster, storage: ModelStorage | None, replayer: Replayer) -> None:
        self._model = model
        self._cluster = cluster
        self._storage = storage
        self._replayer = replayer
        self._place: Workers | None = None
        """Ranks that were vacated: nobody else can have what they hold of the cluster."""

    async def regain(self, lost: Workers | None, applied: int | None) -> None:
        """Bring the model back to its last command. lost: the ranks that it had; applied: what a rank has counted whose
        state is that of this command, None where none can be trusted.

        Waits for ranks and storage that are not there. Raises why the model cannot be brought back.
        """
        state = None if lost is None or applied is None else await self._salvage(lost, applied)
        try:
            if lost is not None:
                await self._vacate(lost)
            await self._try_until_there(state)
        finally:
            if state is not None:
                remove_files(state_files(state))
            if self._place is not None:
                await asyncio.shield(self._give_up(self._place))

    async def _salvage(self, lost: Workers, applied: int) -> ModelState | None:
        try:
            return await lost.salvage(applied)
        except Exception:
            logger.exception("models/%s: what a rank still had could not be read", self._model.id)
            return None

    async def _vacate(self, lost: Workers) -> None:
        """End these ranks. What they hold of the cluster is kept for those that come."""
        before, self._place = self._place, lost
        try:
            await lost.vacate()
            if before is not None:
                await before.close(reuse=False)
        except Exception:
            logger.exception("models/%s: its lost ranks could not be ended", self._model.id)

    async def _give_up(self, lost: Workers) -> None:
        try:
            await lost.close(reuse=False)
        except Exception:
            logger.exception("models/%s: its lost ranks could not be ended", self._model.id)

    async def _try_until_there(self, state: ModelState | None) -> None:
        pause, failures, losses, lost_at = FIRST_PAUSE, 0, 0, -1
        if state is None and self._storage is None:
            raise FailedPrecondition("its ranks are lost, and at durability none nothing else has it")
        while True:
            try:
                if state is not None:
                    await self._from_state(state)
                else:
                    assert self._storage is not None
                    await self._from_storage(self._storage)
                return
            except Exception as error:
                waits = may_pass(error)
                if isinstance(error, RankLost):
                    losses = losses + 1 if self._model.number == lost_at else 1
                    lost_at = self._model.number
                elif not waits:
                    failures += 1
                if failures == ATTEMPTS or losses == LOSSES:
                    raise public_error(error, None) from None
                logger.warning("models/%s cannot be brought back yet: %s", self._model.id, error)
                if waits:
                    self._model.waits_for(public_error(error, None))
                elif self._storage is not None:
                    state = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _from_state(self, state: ModelState) -> None:
        workers = await self._start(self._model.spec, state)
        self._model.adopt(workers, state.trained)

    async def _from_storage(self, storage: ModelStorage) -> None:
        saved, spec = await read_newest(storage.checkpoints, self._model.id)
        try:
            self._model.goes_back_to(saved, spec)
            journal, entries = await self._entries(storage, spec, saved.state.command)
            workers = await self._start(spec, saved.state)
            self._model.adopt(workers, saved.state.trained)
        finally:
            await in_thread(saved.remove_files)
        try:
            with workers.without_limits():
                await apply_again(self._model, self._replayer, journal, entries)
        except BaseException:
            await asyncio.shield(self._vacate(workers))
            raise

    async def _start(self, spec: CurrentSpec, state: ModelState) -> Workers:
        try:
            return await self._cluster.start_group(
                spec.value,
                state.tensors,
                None,
                model_id=self._model.id,
                state=state,
                place=self._place,
                again=True,
            )
        except RankLost as lost:
            # No command is to blame, so it is tried until it succeeds.
            raise Unavailable(lost.message, reason=lost.reason) from None

    async def _entries(self, storage: ModelStorage, spec: CurrentSpec, after: int) -> tuple[Journal, Iterator[Entry]]:
        journal = self._model.journal
        if journal is not None:
            return journal, journal.entries(after)
        journal, entries = await in_thread(storage.open_journal, self._model.id, spec.value.durability, after)
        self._model.takes_journal(journal)
        return journal, entries
