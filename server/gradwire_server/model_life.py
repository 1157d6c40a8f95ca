"""A model from its making to its end: its ranks, its journal and its checkpoints, put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import ModelInfo
from gradwire_server.autograd_commands import AutogradCommands, Turns
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.hosting import Hosting
from gradwire_server.live_ranks import LiveRanks
from gradwire_server.model_checkpoints import ModelCheckpoints
from gradwire_server.model_description import ModelDescription, deleted
from gradwire_server.model_kernels import ModelKernels
from gradwire_server.model_records import ModelRecords
from gradwire_server.model_recovery import ModelRecovery, Trained
from gradwire_server.request_log import RequestLog
from gradwire_server.step_runs import StepRuns
from gradwire_server.stored_replies import EndedCommand, encode_reply, stored_reply_of
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.work_queue import Job, WorkQueue
from gradwire_server.workers import Workers


class ModelLife:
    """See the module. `commands` runs its requests, `steps` its training steps, `checkpoints` saves it, `recovery`
    brings it back.

    `autograd` has the commands of clients whose own autograd goes through it.
    """

    def __init__(self, description: ModelDescription, hosting: Hosting) -> None:
        self.description = description
        self._hosting = hosting
        self._queue = WorkQueue(hosting.tensors.uploads, hosting.limits.requests_per_model)
        self.ranks = LiveRanks(
            lambda lost, salvage: self.recovery.regain(lost, salvage), lambda lost: self.recovery.begin(lost)
        )
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
        self.kernels = ModelKernels(description, self.commands, lambda: self.ranks.workers)
        """Its compiled kernels."""
        self.recovery = ModelRecovery(
            description,
            hosting,
            self.commands,
            self.ranks,
            self._records,
            self.checkpoints,
            self.autograd,
            self.kernels,
        )

    @property
    def id(self) -> str:
        """The last segment of its name."""
        return self.description.info.id

    @property
    def is_durable(self) -> bool:
        """Whether anything of it outlives its ranks."""
        return self.description.info.durability != "none"

    async def begin(self, workers: Workers, call: Call, *, number: int = 0, trained: Trained = None) -> ModelInfo:
        """Serve a new model that these ranks have, once it outlives what it should. `call`: the request that makes it.

        number: that of the last command that it has applied. trained: as in `ModelRecovery.adopt`. Whatever fails,
        nothing of it is left in the storage, but where the description says that the model has failed; the ranks are
        the caller's.
        """
        self.commands.number = number
        self.recovery.adopt(workers, trained)
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
                    self.recovery.ended()
                raise
        self.checkpoints.watch([number] if self.is_durable else ())
        self.description.ready()
        self.kernels.watch()
        self.recovery.not_needed()
        return self.description.info

    async def _enter_storage(self, call: Call) -> None:
        storage, made_by = self._hosting.storage, None
        await storage.swept()
        # Of an earlier model of this name, should it be that they could not be removed with it.
        await in_thread(storage.checkpoints.delete_automatic, self.id, threads=storage.checkpoints.threads)
        await self.checkpoints.save_here()
        if call.request_id is not None:
            reply = encode_reply(call.method, replace(self.description.info, state="ready")).SerializeToString()
            ended = EndedCommand(self.commands.number, call.method, reply)
            made_by = stored_reply_of(call.request_id, call.body, ended, time.time())
        await in_thread(storage.make, self.id, made_by)
        durability = self.description.info.durability
        journal, _ = await in_thread(storage.open_journal, self.id, durability, self.commands.number)
        self._records.journal = journal

    async def idle(self) -> None:
        """Return when no request waits or runs. To be brought back is no request."""
        if self.recovery.is_over:
            await self._queue.idle()

    async def close(self) -> None:
        """Refuse what waits and what still comes, and free the ranks, after what runs has ended. Idempotent.

        What runs for longer than the setting delete_seconds ends with the ranks' processes. The storage keeps all.
        """
        self.ranks.leave()
        self.autograd.close()
        await self.kernels.close()
        no_more_checkpoints = asyncio.ensure_future(self.checkpoints.close())
        refusal = deleted(self.description.name)
        self.steps.refuse(refusal)
        ended = await self._queue.close(refusal, self._hosting.delete_seconds)
        first = await self._free_ranks(reuse=ended and not self.description.has_failed)
        if not ended:
            await self._queue.cut()
            if self.ranks.there and self.ranks.workers is not first:
                # They had just taken the place of lost ones.
                await self._free_ranks(reuse=False)
        self.recovery.ended()
        await no_more_checkpoints
        await in_thread(self._records.close)

    async def _free_ranks(self, *, reuse: bool) -> Workers | None:
        if not self.ranks.there:
            return None
        await self.ranks.workers.close(reuse=reuse)
        return self.ranks.workers

    async def _in_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        await self.commands.take_turn(Call(), None, lambda _: work(), limited=False).result(None)
