"""The checkpoints of one model: what is in one, and who has one taken."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gradwire_proto.errors import AlreadyExists
from gradwire_proto.names import automatic_checkpoint
from gradwire_proto.values import Checkpoint, ModelState
from gradwire_server.calls import Call
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpoint_requests import Saving
from gradwire_server.checkpoint_source import CheckpointSource
from gradwire_server.checkpointer import Checkpointer
from gradwire_server.commands import Commands
from gradwire_server.hosting import Hosting
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_records import ModelRecords
from gradwire_server.storage.checkpoint_store import key_of
from gradwire_server.storage.saved_model import SavedModel, state_files
from gradwire_server.stored_replies import EndedCommand
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.tensors.held_files import remove_files
from gradwire_server.work_queue import Unsettled


class ModelCheckpoints:
    """See the module. `save_here` and `begin_anew` belong to the turn of a request.

    release: lets go of all forwards that the ranks retain, in a turn.
    """

    def __init__(
        self,
        description: ModelDescription,
        hosting: Hosting,
        commands: Commands,
        ranks: LiveRanks,
        records: ModelRecords,
        *,
        release: Callable[[], Awaitable[None]],
    ) -> None:
        self._description = description
        self._hosting = hosting
        self._commands = commands
        self._ranks = ranks
        self._records = records
        self._release = release
        self._checkpointer: Checkpointer | None = None
        self._came_from: int | None = None
        self._saved_before: frozenset[str] | None = frozenset()
        """The requests of which an earlier process of the service has made checkpoints; None: not looked up yet."""

    async def save(self, name: str | None, call: Call) -> Checkpoint:
        """Save the model under a name; None: one is made up. See Checkpointer.save, and RequestLog.find."""
        self._description.check_usable()
        assert self._checkpointer is not None, "a usable model is watched"
        self._commands.log.find(call)
        return await self._checkpointer.save(name, call.request_id)

    async def request(self, request_id: str) -> Saving | EndedCommand | None:
        """What became of the request for a checkpoint with that id; None where no such is known.

        Raises errors of the store.
        """
        if self._checkpointer is None:
            return None
        if self._saved_before is None:
            store = self._hosting.storage.checkpoints
            self._saved_before = await in_thread(store.requests, self._description.info.id, threads=store.threads)
        if request_id in self._saved_before:
            return EndedCommand(0, "CreateCheckpoint", None)
        return self._checkpointer.request(request_id)

    def is_needed(self, number: int) -> bool:
        """Whether it would be brought back from its automatic checkpoint of that number."""
        return self._checkpointer is None or number == self._checkpointer.newest

    def _capture(self, automatic: bool) -> Awaitable[SavedModel | None]:
        """The model in its turn. See SavableModel."""

        async def work(_: Any) -> SavedModel | Unsettled[SavedModel | None] | None:
            # A model that is ahead of its journal may still go back.
            ahead = self._records.journal is not None and self._records.journal.broken is not None
            if automatic:
                return None if ahead or self._ranks.workers.retains else await self._snapshot()
            await self._hosting.storage.swept()
            await self._records.usable()
            saved = await self._snapshot()
            unsettled = self._records.unsettled
            if unsettled is None:
                return saved
            # Nobody may restore from commands that are undone in the end.
            unsettled.add_done_callback(partial(_keep_if_settled, saved))
            return Unsettled(saved, unsettled)

        return self._commands.take_turn(Call(), None, work, limited=False).result(None)

    async def _snapshot(self, *, alone: bool = False) -> SavedModel:
        """The model as it is, in a turn. Its tensors are files that belong to the caller. alone: see `begin_anew`."""

        async def look() -> ModelState:
            if alone and self._ranks.workers.retains:
                await self._release()
            return await self._ranks.workers.state()

        state = await self._ranks.run(look, changes=False)
        replies = self._commands.log.stored()
        try:
            spec = await in_thread(self._description.spec.encoded)
            older, newer = await in_thread(replies)
        except BaseException:
            remove_files(state_files(state))
            raise
        return SavedModel(
            name=automatic_checkpoint(self._description.info.id, self._commands.number),
            model_id=self._description.info.id,
            automatic=True,
            created_at=time.time(),
            request_id=None,
            spec=spec,
            layout=self._description.info.tensors,
            workers=self._description.info.workers,
            state=replace(state, command=self._commands.number),
            replies=newer,
            older=older,
        )

    async def save_here(self, *, alone: bool = False) -> None:
        """Take an automatic checkpoint in the turn that it is. alone: see `begin_anew`."""
        saved = await self._snapshot(alone=alone)
        try:
            store = self._hosting.storage.checkpoints
            await in_thread(store.write, key_of(saved.name), saved, threads=store.threads)
        finally:
            await in_thread(saved.remove_files)

    async def begin_anew(self) -> None:
        """Take a checkpoint in the turn that it is, and start the journal anew behind it.

        Forwards that are retained are not in it, and their records go with the journal. So they are let go of: no
        command that a later restart cannot apply again may use them.
        """
        assert self._records.journal is not None and self._records.journal.broken is not None
        try:
            await self.save_here(alone=True)
        except AlreadyExists:
            # The same one is being written in the background: the journal is mended the next time.
            raise copy.copy(self._records.journal.broken) from None
        await in_thread(self._records.journal.restart, self._commands.number)
        self._description.all_settled()
        if self._checkpointer is not None:
            self._checkpointer.took(self._commands.number)

    def applied(self) -> None:
        """A command was applied."""
        if self._checkpointer is not None:
            self._checkpointer.applied()

    async def save_changed(self) -> None:
        """Take one of a model that is served, where it has changed since the newest. A failure is logged."""
        if self._checkpointer is not None and self._description.info.state == "ready":
            await self._checkpointer.save_changed()

    def came_from(self, number: int) -> None:
        """The model was brought back from its automatic checkpoint of that number: newer ones cannot be read."""
        self._came_from = number
        if self._checkpointer is not None:
            self._checkpointer.came_from(number)

    def watch(self, kept: Sequence[int]) -> None:
        """Take checkpoints from now on. kept: the numbers of those that there are."""
        if self._came_from is not None:
            self._saved_before = None
            kept = [*(each for each in kept if each < self._came_from), self._came_from]
        info, keeping, policy = self._description.info, self._hosting.keeping, None
        if info.durability != "none":
            policy = CheckpointPolicy(
                commands=info.checkpoint_every,
                journal_bytes=keeping.checkpoint_bytes,
                seconds=keeping.checkpoint_seconds,
                keep=info.keep_checkpoints,
            )
        source = CheckpointSource(
            self._description.info.id, lambda: self._commands.number, lambda: self._records.journal, self._capture
        )
        store = self._hosting.storage.checkpoints
        self._checkpointer = Checkpointer(source, store, policy, kept, threads=store.threads)

    async def close(self) -> None:
        """Take no more, and wait for those that are being taken."""
        if self._checkpointer is not None:
            await self._checkpointer.close()


def _keep_if_settled(saved: SavedModel, settled: asyncio.Future[None]) -> None:
    if settled.cancelled() or settled.exception() is not None:
        saved.remove_files()
