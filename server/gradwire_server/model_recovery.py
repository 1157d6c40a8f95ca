"""How one model comes back: when the service is started, and when its ranks are lost."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from contextlib import suppress
from typing import Any, TypeAlias

from gradwire_proto.errors import GradwireError, RankLost
from gradwire_server.autograd_commands import AutogradCommands
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.hosting import Hosting
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_checkpoints import ModelCheckpoints
from gradwire_server.model_description import ModelDescription, recovering
from gradwire_server.model_kernels import ModelKernels
from gradwire_server.model_records import ModelRecords
from gradwire_server.restoring import Restorer
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.stored_replies import EndedCommand, ended_command
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.work_queue import queue_full
from gradwire_server.workers import Workers

Trained: TypeAlias = "tuple[str, ...] | None"

logger = logging.getLogger(__name__)


class ModelRecovery:
    """See the module. It is the `Restored` of its Restorer. Its other arguments are the parts of the same model.

    wants_ranks: whether the model is brought back by a service that has just started, and may still find ranks.
    """

    def __init__(
        self,
        description: ModelDescription,
        hosting: Hosting,
        commands: Commands,
        ranks: LiveRanks,
        records: ModelRecords,
        checkpoints: ModelCheckpoints,
        autograd: AutogradCommands,
        kernels: ModelKernels,
    ) -> None:
        self.wants_ranks = False
        self._description = description
        self._hosting = hosting
        self._commands = commands
        self._ranks = ranks
        self._records = records
        self._checkpoints = checkpoints
        self._autograd = autograd
        self._kernels = kernels
        self._over = asyncio.Event()
        """Set when the model is there for the first time, or cannot be."""
        self._waiting = 0
        self._knows_all = False
        """Whether the log has all requests: not before the journal was read."""

    # --- when the service is started ------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the model is there, or cannot be."""
        return self._over.is_set()

    def ended(self) -> None:
        """Whoever waits for the model need not wait any more."""
        self.wants_ranks = False
        self._over.set()

    def not_needed(self) -> None:
        """The model is new."""
        self._knows_all = True
        self.ended()

    def restore(self) -> None:
        """Serve a model of the storage, once it has been brought back, in the background."""

        async def work(_: Any) -> None:
            try:
                await self._hosting.storage.swept()
                await self._restorer.regain(None, None)
                self._ranks.caught_up()
                self._knows_all = True
                self._checkpoints.watch(await self._kept_checkpoints())
                self._description.ready()
                self._kernels.watch()
                logger.info("models/%s is back, at step %d", self.id, self._description.info.step)
            except GradwireError as error:
                self._description.failed(error)
                logger.error("models/%s cannot be brought back: %s", self.id, error)

        self.wants_ranks = True
        self._commands.take_turn(Call(), None, work, limited=False).on_end(lambda _: self.ended())

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
        if call.replay is not None or self._over.is_set():
            return
        limit = self._hosting.limits.requests_per_model
        if self._waiting >= limit:
            raise queue_full(limit)
        self._waiting += 1
        try:
            await self._over.wait()
        finally:
            self._waiting -= 1

    async def knows(self, request_id: str, *, wait: bool) -> None:
        """Return when it is known what became of the request with that id, as far as it ever will be.

        Raises Unavailable MODEL_RECOVERING where it is not known yet and the caller does not `wait`; FailedPrecondition
        where the model cannot be brought back.
        """
        if self._commands.is_settled(request_id):
            return
        if wait:
            await self.there(Call())
        elif self._description.info.state == "recovering" and (request_id in self._commands.log or not self._knows_all):
            raise recovering(
                f"{self._description.name} is being brought back: nobody knows yet what became of {request_id}"
            )
        if not (self._knows_all or request_id in self._commands.log):
            self._description.check_usable()

    # --- when ranks are lost --------------------------------------------------------------------------------------

    def begin(self, lost: RankLost) -> None:
        """Nobody may be at work: the ranks are replaced all the same."""
        self._description.met(lost)
        self._description.recovering()
        try:
            self._commands.take_turn(Call(), None, lambda _: self._ranks.ensure(), limited=False)
        except GradwireError:
            return  # The next of those that wait replaces them, or the model is on its way out.

    async def regain(self, lost: RankLost, salvage: bool) -> None:
        """Other ranks take the place of the lost ones. See LiveRanks."""
        if not self._over.is_set():
            # Nobody has been told of it yet.
            lost = copy.copy(lost)
            lost.outcome = "not_applied"
            raise lost
        started = time.monotonic()
        logger.warning("models/%s lost its ranks: %s", self.id, lost)
        self._description.met(lost)
        self._description.recovering()
        try:
            await self._restorer.regain(self._ranks.workers, self._ranks.applied if salvage else None)
        except GradwireError as error:
            logger.error("models/%s cannot be brought back: %s", self.id, error)
            self._description.failed(error if self._is_durable else lost)
            if not self._is_durable:
                raise copy.copy(lost) from None
            self._description.check_usable()
        self._ranks.caught_up()
        self._commands.goes_back_to(self.number)
        await self._records.goes_back_to(self.number)
        self._description.ready()
        with suppress(RankLost):
            await self._autograd.release_again()
        logger.info("models/%s is back after %.2f s", self.id, time.monotonic() - started)

    @property
    def _is_durable(self) -> bool:
        return self._description.info.durability != "none"

    @property
    def _restorer(self) -> Restorer:
        storage = self._hosting.storage if self._is_durable else None
        return Restorer(self, self._hosting.cluster, storage, self._hosting.replayer)

    # --- as its Restorer sees it ----------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The last segment of its name."""
        return self._description.info.id

    @property
    def number(self) -> int:
        """The number of the last command that was applied."""
        return self._commands.number

    @property
    def spec(self) -> CurrentSpec:
        """The spec as of the last command."""
        return self._description.spec

    @property
    def journal(self) -> Journal | None:
        """Where commands are recorded; None: nowhere."""
        return self._records.journal

    def takes_journal(self, journal: Journal) -> None:
        """Commands are recorded here."""
        self._records.journal = journal

    def goes_back_to(self, saved: SavedModel, spec: CurrentSpec) -> None:
        """What follows is applied to this checkpoint."""
        self._description.goes_back_to(spec, saved.state.step)
        self._autograd.goes_back()
        self._commands.number = saved.state.command
        self._checkpoints.came_from(saved.state.command)
        self._records.saved(saved.state.command)
        if self._over.is_set():
            return  # All of it is known, or was forgotten because it is old.
        for reply in saved.replies:
            self._commands.log.restore(reply.request_id, reply.body, ended_command(reply), reply.ended_at)

    def adopt(self, workers: Workers, trained: Trained) -> None:
        """Commands run on these ranks from now on. trained: the parameters that they train; None: as the spec says."""
        self._ranks.adopt(workers)
        self.wants_ranks = False
        if self._description.info.architecture is not None:
            self._description.built(workers.tensors, workers.variants)
        if trained is not None:
            self._description.trains(trained)
        self._description.has_ranks(workers.sharding, workers.device)
        if self._description.info.compile:
            self._description.compiled(workers.kernels.told)

    def waits_for(self, error: GradwireError) -> None:
        """It cannot be brought back yet, because of this."""
        if error.reason in ("WORKERS_EXHAUSTED", "GPUS_EXHAUSTED"):
            # Others need not wait for as long as it does.
            self.wants_ranks = False
        self._description.met(error)

    async def release_again(self, names: tuple[str, ...]) -> None:
        """Let go of retained forwards on ranks to which commands are applied once more."""
        await self._autograd.release_again(names)

    async def let_go_of_datasets(self) -> None:
        """Have the ranks let go of what fits that were applied once more have mapped."""
        await self._ranks.workers.fitting.forget()

    def wants_answer(self, entry: Entry) -> bool:
        """Whether somebody may still ask what this command answered, and it is not known here."""
        return entry.request_id is not None and not self._over.is_set() and entry.request_id not in self._commands.log

    def applied_again(self, entry: Entry, ended: EndedCommand) -> None:
        """This command of the journal was applied once more."""
        if not entry.unnumbered:
            self._commands.number = entry.number
        if entry.request_id is not None and not self._over.is_set():
            self._commands.log.restore(entry.request_id, entry.body, ended)
