"""A model from its making to its end: its ranks, its journal and its checkpoints, and how they come back."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

from gradwire_proto.errors import GradwireError, RankLost
from gradwire_proto.values import ModelInfo
from gradwire_server.autograd_commands import AutogradCommands, Turns
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.hosting import Hosting
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_checkpoints import ModelCheckpoints
from gradwire_server.model_description import ModelDescription, deleted
from gradwire_server.model_records import ModelRecords
from gradwire_server.request_log import RequestLog
from gradwire_server.restoring import Restorer, ended_command, stored_reply_of
from gradwire_server.step_runs import StepRuns
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.stored_replies import EndedCommand, encode_reply
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.work_queue import Job, WorkQueue, queue_full
from gradwire_server.workers import Workers

Trained: TypeAlias = "tuple[str, ...] | None"

logger = logging.getLogger(__name__)


class ModelLife:
    """See the module. `commands` runs its requests, `steps` those of streams, `checkpoints` saves it.

    `autograd` has the commands of clients whose own autograd goes through it.
    """

    def __init__(self, description: ModelDescription, hosting: Hosting) -> None:
        self.description = description
        self._hosting = hosting
        self._queue = WorkQueue(hosting.tensors.uploads, hosting.limits.requests_per_model)
        self.ranks = LiveRanks(self._regain, self._ranks_lost)
        self._records = ModelRecords(lambda: self.checkpoints.begin_anew(), self._in_turn)
        # Some that failed, or were given up, come between the few replies that may be wanted again.
        capacity = max(hosting.stored_replies, hosting.limits.requests_per_model)
        log: RequestLog[Job[Any]] = RequestLog(capacity, hosting.limits.message_bytes)
        self.commands = Commands(
            description,
            self._queue,
            log,
            self.ranks,
            self._records,
            released=lambda: self.autograd.take_released(),
            applied=lambda: self.checkpoints.applied(),
        )
        self.steps = StepRuns(
            description,
            self._queue,
            self.commands,
            self.ranks,
            self._records,
            hosting.tensors.uploads,
        )
        self.checkpoints = ModelCheckpoints(
            description, hosting, self.commands, self.ranks, self._records, release=lambda: self.autograd.release_all()
        )
        turns = Turns(command=self.commands.run, read=self.commands.read, begin=self.commands.begin, weigh=log.weigh)
        self.autograd = AutogradCommands(
            turns,
            lambda: self.ranks.workers.retained,
            hosting.tensors.downloads,
            hosting.limits,
            lambda: f"{self.id}/{description.info.created_at}",
        )
        self._there = asyncio.Event()
        self._waiting = 0

    @property
    def id(self) -> str:
        """The last segment of its name."""
        return self.description.info.id

    @property
    def number(self) -> int:
        """The number of the last command that was applied."""
        return self.commands.number

    @property
    def is_durable(self) -> bool:
        """Whether anything of it outlives its ranks."""
        return self.description.info.durability != "none"

    # --- making and ending ----------------------------------------------------------------------------------------

    async def begin(self, workers: Workers, call: Call, *, number: int = 0, trained: Trained = None) -> ModelInfo:
        """Serve a new model that these ranks have, once it outlives what it should. `call`: the request that makes it.

        number: that of the last command that it has applied. trained: as in `adopt`. Whatever fails, nothing of it is
        left in the storage, but where the description says that the model has failed; the ranks are the caller's.
        """
        self.commands.number = number
        self.adopt(workers, trained)
        if self.is_durable:
            try:
                await self._enter_storage(call)
            except BaseException:
                self._records.close()
                storage = self._hosting.storage
                try:
                    await asyncio.shield(in_thread(storage.delete, self.id, threads=storage.checkpoints.threads))
                except GradwireError as error:
                    # A restart may find it.
                    self.description.failed(error)
                    self._there.set()
                raise
        self.checkpoints.watch([number] if self.is_durable else ())
        self.description.ready()
        self._there.set()
        return self.description.info

    async def _enter_storage(self, call: Call) -> None:
        storage, made_by = self._hosting.storage, None
        await storage.swept()
        # Of an earlier model of this name, should it be that they could not be removed with it.
        await in_thread(storage.checkpoints.delete_automatic, self.id, threads=storage.checkpoints.threads)
        await self.checkpoints.save_here()
        if call.request_id is not None:
            reply = encode_reply(call.method, replace(self.description.info, state="ready")).SerializeToString()
            made_by = stored_reply_of(call.request_id, call.body, EndedCommand(self.number, call.method, reply))
        await in_thread(storage.make, self.id, made_by)
        durability = self.description.info.durability
        journal, _ = await in_thread(storage.open_journal, self.id, durability, self.number)
        self.takes_journal(journal)

    def restore(self) -> None:
        """Serve a model of the storage, once it has been brought back, in the background."""

        async def work(_: Any) -> None:
            try:
                await self._hosting.storage.swept()
                await self._restorer.regain(None, None)
                self.checkpoints.watch(await self._kept_checkpoints())
                self.description.ready()
                logger.info("models/%s is back, at step %d", self.id, self.description.info.step)
            except GradwireError as error:
                self.description.failed(error)
                logger.error("models/%s cannot be brought back: %s", self.id, error)

        job = self.commands.take_turn(Call(), None, work, limited=False)
        job.on_end(lambda _: self._there.set())

    async def _kept_checkpoints(self) -> list[int]:
        try:
            store = self._hosting.storage.checkpoints
            return await in_thread(store.automatic, self.id, threads=store.threads)
        except GradwireError as error:
            # The others stay until the model is brought back once more.
            logger.warning("models/%s: its checkpoints cannot be listed: %s", self.id, error)
            return []

    async def there(self, call: Call) -> None:
        """Return when the model has been brought back, or cannot be. What repeats a request is only known then.

        Raises ResourceExhausted QUEUE_FULL where too many wait for it already.
        """
        if call.replay is not None or self._there.is_set():
            return
        limit = self._hosting.limits.requests_per_model
        if self._waiting >= limit:
            raise queue_full(limit)
        self._waiting += 1
        try:
            await self._there.wait()
        finally:
            self._waiting -= 1

    async def idle(self) -> None:
        """Return when no request waits or runs. To be brought back is no request."""
        if self._there.is_set():
            await self._queue.idle()

    async def close(self) -> None:
        """Refuse what waits and what still comes, and free the ranks, after what runs has ended. Idempotent.

        What runs for longer than the setting delete_seconds ends with the ranks' processes. The storage keeps all.
        """
        self.ranks.leave()
        self.autograd.close()
        no_more_checkpoints = asyncio.ensure_future(self.checkpoints.close())
        ended = await self._queue.close(deleted(self.description.name), self._hosting.delete_seconds)
        first = await self._free_ranks(reuse=ended and not self.description.has_failed)
        if not ended:
            await self._queue.cut()
            if self.ranks.there and self.ranks.workers is not first:
                # They had just taken the place of lost ones.
                await self._free_ranks(reuse=False)
        self._there.set()
        await no_more_checkpoints
        await in_thread(self._records.close)

    async def _free_ranks(self, *, reuse: bool) -> Workers | None:
        if not self.ranks.there:
            return None
        await self.ranks.workers.close(reuse=reuse)
        return self.ranks.workers

    # --- how it comes back ----------------------------------------------------------------------------------------

    @property
    def _restorer(self) -> Restorer:
        storage = self._hosting.storage if self.is_durable else None
        return Restorer(self, self._hosting.cluster, storage, self._hosting.replayer)

    def _ranks_lost(self, lost: RankLost) -> None:
        """Nobody may be at work: the ranks are replaced all the same."""
        self.description.met(lost)
        self.description.recovering()
        try:
            self.commands.take_turn(Call(), None, lambda _: self.ranks.ensure(), limited=False)
        except GradwireError:
            return  # The next of those that wait replaces them, or the model is on its way out.

    async def _regain(self, lost: RankLost, salvage: bool) -> None:
        if not self._there.is_set():
            # Nobody has been told of it yet.
            lost = copy.copy(lost)
            lost.outcome = "not_applied"
            raise lost
        started = time.monotonic()
        logger.warning("models/%s lost its ranks: %s", self.id, lost)
        self.description.met(lost)
        self.description.recovering()
        try:
            await self._restorer.regain(self.ranks.workers, self.ranks.applied if salvage else None)
        except GradwireError as error:
            logger.error("models/%s cannot be brought back: %s", self.id, error)
            self.description.failed(error if self.is_durable else lost)
            if not self.is_durable:
                raise copy.copy(lost) from None
            self.description.check_usable()
        self.commands.log.goes_back_to(self.number)
        self._records.goes_back_to(self.number)
        self.description.ready()
        with suppress(RankLost):
            await self.autograd.release_again()
        logger.info("models/%s is back after %.2f s", self.id, time.monotonic() - started)

    async def _in_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        await self.commands.take_turn(Call(), None, lambda _: work(), limited=False).result(None)

    @property
    def spec(self) -> CurrentSpec:
        """The spec as of the last command."""
        return self.description.spec

    @property
    def journal(self) -> Journal | None:
        """Where commands are recorded; None: nowhere."""
        return self._records.journal

    def takes_journal(self, journal: Journal) -> None:
        """Commands are recorded here."""
        self._records.journal = journal

    def goes_back_to(self, saved: SavedModel, spec: CurrentSpec) -> None:
        """What follows is applied to this checkpoint."""
        self.description.goes_back_to(spec, saved.state.step)
        self.autograd.goes_back()
        self.commands.number = saved.state.command
        self.checkpoints.came_from(saved.state.command)
        self._records.saved(saved.state.command)
        for reply in saved.replies:
            self.commands.log.restore(reply.request_id, reply.body, ended_command(reply))

    def adopt(self, workers: Workers, trained: Trained) -> None:
        """Commands run on these ranks from now on. trained: the parameters that they train; None: as the spec says."""
        self.ranks.adopt(workers)
        if self.description.info.architecture is not None:
            self.description.built(workers.tensors, workers.variants)
        if trained is not None:
            self.description.trains(trained)
        self.description.has_ranks(workers.sharding, workers.device)

    def waits_for(self, error: GradwireError) -> None:
        """It cannot be brought back yet, because of this."""
        self.description.met(error)

    async def release_again(self, names: tuple[str, ...]) -> None:
        """Let go of retained forwards on ranks to which commands are applied once more."""
        await self.autograd.release_again(names)

    def applied_again(self, entry: Entry, ended: EndedCommand) -> None:
        """This command of the journal was applied once more."""
        self.commands.number = entry.number
        if entry.request_id is not None:
            self.commands.log.restore(entry.request_id, entry.body, ended)
