"""A model's ranks brought back to where it was: from a rank that is left, or from a checkpoint and the journal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Protocol

from gradwire_proto.errors import FailedPrecondition, GradwireError, RankLost, ResourceExhausted, Unavailable
from gradwire_proto.names import automatic_checkpoint
from gradwire_proto.values import ModelState, TensorData, leaves
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.failures import public_error
from gradwire_server.model_storage import ModelStorage
from gradwire_server.replaying import Replayer, check_same
from gradwire_server.storage.checkpoint_store import CheckpointStore, key_of
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.stored_replies import EndedCommand, decode_reply, kills_ranks
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.tensors.held_files import remove_files, segment_paths
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

ANSWERED = 8
"""How many of the last commands may have been answered to nobody: their answers are made anew where not stored."""

READ_AHEAD = 16
"""Entries of a journal that are read at once, each with a reply of up to 4 MiB."""


class Restored(Protocol):
    """A model that is brought back."""

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

    def applied_again(self, entry: Entry, ended: EndedCommand) -> None:
        """This command of the journal was applied once more."""
        ...


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
                waits = _passes(error)
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
        spec = self._model.spec.value
        workers = await self._cluster.start_group(
            spec, state.tensors, None, model_id=self._model.id, state=state, place=self._place
        )
        self._model.adopt(workers, state.trained)

    async def _from_storage(self, storage: ModelStorage) -> None:
        saved, spec = await in_thread(self._read_newest, storage, threads=storage.checkpoints.threads)
        try:
            self._model.goes_back_to(saved, spec)
            journal, entries = await self._entries(storage, spec, saved.state.command)
            workers = await self._start(spec, saved)
            self._model.adopt(workers, saved.state.trained)
        finally:
            saved.remove_files()
        try:
            await self._apply_again(journal, entries)
        except BaseException:
            await asyncio.shield(self._vacate(workers))
            raise

    async def _start(self, spec: CurrentSpec, saved: SavedModel) -> Workers:
        try:
            return await self._cluster.start_group(
                spec.value, saved.state.tensors, None, model_id=self._model.id, state=saved.state, place=self._place
            )
        except RankLost as lost:
            # No command is to blame, so it is tried until it succeeds.
            raise Unavailable(lost.message, reason=lost.reason) from None

    def _read_newest(self, storage: ModelStorage) -> tuple[SavedModel, CurrentSpec]:
        """The newest checkpoint that is whole: the journal goes back to the one before."""
        numbers = storage.checkpoints.automatic(self._model.id)
        first: GradwireError | None = None
        for number in numbers:
            try:
                return _decoded(storage.checkpoints.read(key_of(automatic_checkpoint(self._model.id, number))))
            except FailedPrecondition as error:
                if _passes(error):
                    raise
                logger.error("%s", error)
                first = first or error
        raise first or FailedPrecondition("it has no checkpoint", reason="CHECKPOINT_CORRUPT")

    async def _entries(self, storage: ModelStorage, spec: CurrentSpec, after: int) -> tuple[Journal, Iterator[Entry]]:
        journal = self._model.journal
        if journal is not None:
            return journal, journal.entries(after)
        journal, entries = await in_thread(storage.open_journal, self._model.id, spec.value.durability, after)
        self._model.takes_journal(journal)
        return journal, entries

    async def _apply_again(self, journal: Journal, entries: Iterator[Entry]) -> None:
        newest: deque[Entry] = deque()
        # In a thread: every byte of a journal is looked at.
        while read := await in_thread(lambda: list(islice(entries, READ_AHEAD))):
            newest.extend(read)
            while len(newest) > ANSWERED:
                await self._apply_one(journal, newest.popleft(), answered=False)
        for entry in newest:
            await self._apply_one(journal, entry, answered=True)

    async def _apply_one(self, journal: Journal, entry: Entry, *, answered: bool) -> None:
        await self._model.release_again(entry.released)
        answered = answered and entry.reply is None
        ended = EndedCommand(entry.number, entry.method, entry.reply)
        if entry.refused is not None:
            ended.error = kills_ranks(entry.refused)
        else:
            try:
                response = await self._replayer.apply(entry, journal, answered=answered)
            except RankLost:
                raise
            except GradwireError as error:
                if error.outcome != "applied":
                    if _passes(error):
                        raise
                    raise FailedPrecondition(
                        f"command {entry.number} of its journal, a {entry.method}, is refused now: {error}",
                        reason="JOURNAL_CORRUPT",
                    ) from None
            else:
                check_same(f"models/{self._model.id}", entry, response)
                if answered:
                    ended.answer = decode_reply(entry.method, response.SerializeToString())
        self._model.applied_again(entry, ended)


def _passes(error: Exception) -> bool:
    """Whether a model may come back when it is tried again later: ranks, memory or storage are not there now."""
    if isinstance(error, RankLost):
        return False
    read_only = isinstance(error, GradwireError) and error.reason == "STORAGE_READ_ONLY"
    return read_only or isinstance(error, Unavailable | ResourceExhausted)


def _decoded(saved: SavedModel) -> tuple[SavedModel, CurrentSpec]:
    try:
        return saved, CurrentSpec.decode(saved.spec)
    except BaseException:
        saved.remove_files()
        raise


def read_checkpoint(store: CheckpointStore, name: str, workers: int | None) -> tuple[SavedModel, CurrentSpec]:
    """A checkpoint for a new model of so many ranks; None: as many as it had. Its files are the caller's. Blocks."""
    saved, spec = _decoded(store.read(key_of(name)))
    value = spec.value
    if workers is not None and workers != value.workers:
        value = replace(value, workers=workers)
        saved = replace(saved, state=_untried(saved.state) if saved.workers == 1 else saved.state)
    return saved, CurrentSpec(value, time.time())


def _untried(state: ModelState) -> ModelState:
    """The state of a model of one rank for several: nobody has tried whether its rows are independent."""
    reason = "the model was saved from one rank, which computes every batch whole"
    splits = {name: replace(each, whole=reason) for name, each in state.splits.items()}
    return replace(state, splits=splits)


def state_files(state: ModelState) -> set[str]:
    """The files that hold a state's tensors."""
    values = (dict(state.tensors), state.optimizer, [dict(held or {}) for held in state.held])
    return segment_paths(leaf for value in values for _, leaf in leaves(value) if isinstance(leaf, TensorData))
