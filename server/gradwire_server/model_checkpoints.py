"""The checkpoints of one model: what is in one, and who has one taken."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

from gradwire_proto.names import automatic_checkpoint
from gradwire_proto.values import Checkpoint
from gradwire_server.calls import Call
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpoint_source import CheckpointSource
from gradwire_server.checkpointer import Checkpointer
from gradwire_server.commands import Commands
from gradwire_server.hosting import Hosting
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_records import ModelRecords
from gradwire_server.restoring import state_files, stored_reply_of
from gradwire_server.storage.checkpoint_store import key_of
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.tensors.held_files import remove_files


class ModelCheckpoints:
    """See the module. `save_here` and `begin_anew` belong to the turn of a request."""

    def __init__(
        self,
        description: ModelDescription,
        hosting: Hosting,
        commands: Commands,
        ranks: LiveRanks,
        records: ModelRecords,
    ) -> None:
        self._description = description
        self._hosting = hosting
        self._commands = commands
        self._ranks = ranks
        self._records = records
        self._checkpointer: Checkpointer | None = None

    async def save(self, name: str | None, call: Call) -> Checkpoint:
        """Save the model under a name; None: one is made up. See Checkpointer.save."""
        self._description.check_usable()
        assert self._checkpointer is not None, "a usable model is watched"
        return await self._checkpointer.save(name, call.request_id)

    def is_needed(self, number: int) -> bool:
        """Whether it would be brought back from its automatic checkpoint of that number."""
        return self._checkpointer is None or number == self._checkpointer.newest

    def _capture(self, automatic: bool) -> Awaitable[SavedModel | None]:
        """The model in its turn. See SavableModel."""

        async def work(_: Any) -> SavedModel | None:
            # A model that is ahead of its journal may still go back.
            ahead = self._records.journal is not None and self._records.journal.broken is not None
            return None if automatic and (ahead or self._ranks.workers.retains) else await self._snapshot()

        return self._commands.take_turn(Call(), None, work, limited=False).result(None)

    async def _snapshot(self) -> SavedModel:
        """The model as it is, in a turn. Its tensors are files that belong to the caller."""
        state, _ = await self._ranks.run(lambda: self._ranks.workers.state(), changes=False)
        try:
            spec = await in_thread(self._description.spec.encoded)
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
            replies=tuple(stored_reply_of(*each) for each in self._commands.log.stored()),
        )

    async def save_here(self) -> None:
        """Take an automatic checkpoint in the turn that it is."""
        saved = await self._snapshot()
        try:
            await in_thread(self._hosting.storage.checkpoints.write, key_of(saved.name), saved)
        finally:
            saved.remove_files()

    async def begin_anew(self) -> None:
        """Take a checkpoint in the turn that it is, and start the journal anew behind it.

        Forwards that are retained are not in it. There is nothing better: their journal has a hole.
        """
        assert self._records.journal is not None
        await self.save_here()
        self._records.journal.restart(self._commands.number)
        if self._checkpointer is not None:
            self._checkpointer.took(self._commands.number)

    def applied(self) -> None:
        """A command was applied."""
        if self._checkpointer is not None:
            self._checkpointer.applied()

    def watch(self, kept: Sequence[int]) -> None:
        """Take checkpoints from now on. kept: the numbers of those that there are."""
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
        self._checkpointer = Checkpointer(source, self._hosting.storage.checkpoints, policy, kept)

    async def close(self) -> None:
        """Take no more, and wait for those that are being taken."""
        if self._checkpointer is not None:
            await self._checkpointer.close()
