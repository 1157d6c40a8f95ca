"""Saves a model: by itself when it is time, by name when it is asked to; and drops what newer checkpoints replace."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from gradwire_proto.errors import CheckpointNotFound, GradwireError
from gradwire_proto.names import automatic_checkpoint, check_checkpoint_id
from gradwire_proto.values import Checkpoint
from gradwire_server.checkpoint_policy import CheckpointPolicy, Checkpoints, SavableModel
from gradwire_server.checkpoint_requests import CheckpointRequests, Saving
from gradwire_server.storage.checkpoint_store import key_of
from gradwire_server.storage.saved_model import SavedModel

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
"""Seconds until a checkpoint that failed is tried again; twice as many each time."""

_RETAINED_WAIT = 2.0
"""Seconds until it is looked again whether a model still retains forwards."""


class Checkpointer:
    """Saves one model, in the background, one checkpoint at a time. Commands wait for `capture` only.

    kept: the numbers of its automatic checkpoints. policy None: none are taken by themselves. threads: where it writes;
    a store that does not answer holds some of them for a while, so they are better nobody else's. A checkpoint that
    fails is logged and tried again, ever more seldom; the model goes on, and the journal grows.
    """

    def __init__(
        self,
        model: SavableModel,
        store: Checkpoints,
        policy: CheckpointPolicy | None,
        kept: Sequence[int] = (),
        *,
        threads: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._store = store
        self._policy = policy
        self._threads = threads
        self._clock = clock
        self._kept = sorted(kept)
        self._taken_at = clock()
        self._not_before = clock()
        self._wait = _FIRST_WAIT
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._background: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._requests = CheckpointRequests()
        self.last_error: str | None = None
        """What the last checkpoint failed of; None where it did not."""

    @property
    def newest(self) -> int:
        """The number of the newest automatic checkpoint, -1 where there is none."""
        return self._kept[-1] if self._kept else -1

    def applied(self) -> None:
        """A command was applied: take a checkpoint in the background if it is time, or when it will be."""
        policy = self._policy
        if policy is None or self._closed or self._background is not None or self._model.number <= self.newest:
            return
        now = self._clock()
        due = self._is_due(policy, now)
        if due and now >= self._not_before:
            self._cancel_timer()
            self._background = asyncio.get_running_loop().create_task(self._take_in_background())
        elif due:
            self._wake_at(self._not_before)
        elif self._timer is None:
            self._wake_at(self._taken_at + policy.seconds)

    def took(self, number: int) -> None:
        """Somebody else has taken the automatic checkpoint of that number: it is one of those that are kept."""
        self._kept = sorted({*self._kept, number})
        self._taken_at = self._clock()

    def came_from(self, number: int) -> None:
        """The model was brought back from its automatic checkpoint of that number: newer ones cannot be read."""
        self._kept = [each for each in self._kept if each <= number]

    async def save(self, name: str | None, request_id: str | None) -> Checkpoint:
        """Save the model as it is when its turn comes, under a name (None: one is made up), until somebody deletes it.

        AlreadyExists CHECKPOINT_EXISTS; a repeat of the request that made it gets the first answer. InvalidArgument
        REQUEST_ID_REUSED where one of the last requests with that id, since the service started, was for another name.
        The store's errors.
        """
        model_id = self._model.model_id
        if name is None:
            # A repeat of the request finds the same name.
            digest = hashlib.sha256((request_id or secrets.token_hex(16)).encode()).hexdigest()
            name = f"{model_id[:50]}-{digest[:12]}"
        check_checkpoint_id(name)
        saving = self._requests.find(request_id, name)
        if saving is None:
            # At once: the state is that of the caller's turn, however long another checkpoint is being written.
            captured = self._model.capture(automatic=False)
            saving = Saving(name, request_id, self._save(captured, name, request_id))
            self._requests.add(request_id, saving)
            self._tasks.add(saving.task)
            saving.task.add_done_callback(self._ended)
        return await saving.result()

    async def save_changed(self) -> None:
        """Take an automatic checkpoint now, whether it is time or not, where the model has changed since the newest.

        A failure is logged: what it would have held is in the journal.
        """
        if self._policy is None or self._closed or self._model.number <= self.newest:
            return
        try:
            await self._take(self._model.number)
        except GradwireError as error:
            self.last_error = str(error)
            logger.warning("model %s: no last checkpoint could be taken: %s", self._model.model_id, error)

    def request(self, request_id: str) -> Saving | None:
        """What one of the last requests, since the service started, asked for; None: no such request is known."""
        return self._requests.get(request_id)

    async def close(self) -> None:
        """Take no more, and wait for those that are being taken."""
        self._closed = True
        self._cancel_timer()
        while self._tasks or self._background:
            await asyncio.wait([*self._tasks, *([self._background] if self._background else [])])

    # --- taking one -----------------------------------------------------------------------------------------------

    async def _save(self, captured: Awaitable[SavedModel | None], name: str, request_id: str | None) -> Checkpoint:
        saved = await captured
        assert saved is not None
        try:
            async with self._writing:
                saved = replace(saved, name=name, automatic=False, created_at=time.time(), request_id=request_id)
                return await self._in_thread(self._store.write, key_of(name), saved)
        finally:
            await self._in_thread(saved.remove_files)

    async def _take(self, at_least: int) -> bool:
        """Whether there is a checkpoint of command `at_least` or later now."""
        async with self._writing:
            if at_least <= self.newest:
                return True
            saved = await self._model.capture(automatic=True)
            if saved is None:
                return False
            number = saved.state.command
            name = automatic_checkpoint(self._model.model_id, number)
            try:
                saved = replace(saved, name=name, automatic=True, created_at=time.time(), request_id=None)
                await self._in_thread(self._store.write, key_of(name), saved)
            finally:
                await self._in_thread(saved.remove_files)
            # Only now is the new one durable, and may older ones go.
            self._kept = sorted({*self._kept, number})
            self._taken_at = self._clock()
            self.last_error = None
            await self._drop_old()
            return True

    async def _drop_old(self) -> None:
        """Cut the journal, and delete checkpoints that are too many. A failure is logged: the next time does it."""
        keep = self._policy.keep if self._policy is not None else 1
        old, kept = self._kept[:-keep], self._kept[-keep:]
        with self._noting_failure():
            if self._model.journal is not None:
                # Behind the last but one: should the newest prove unreadable, nothing is lost.
                await self._in_thread(self._model.journal.cut(kept[-2:][0]))
        with self._noting_failure():
            for number in old:
                await self._in_thread(self._delete, number)
                self._kept.remove(number)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except GradwireError as error:
            self.last_error = str(error)
            logger.warning("model %s: what a checkpoint holds could not be removed: %s", self._model.model_id, error)

    def _delete(self, number: int) -> None:
        with suppress(CheckpointNotFound):
            self._store.delete(key_of(automatic_checkpoint(self._model.model_id, number)))

    # --- in the background ----------------------------------------------------------------------------------------

    async def _take_in_background(self) -> None:
        try:
            if await self._take(self._model.number):
                self._wait = _FIRST_WAIT
            else:
                self._not_before = self._clock() + _RETAINED_WAIT
        except Exception as error:
            self.last_error = str(error)
            level = logging.WARNING if isinstance(error, GradwireError) else logging.ERROR
            logger.log(
                level,
                "model %s: no checkpoint could be taken, tried again in %g s: %s",
                self._model.model_id,
                self._wait,
                error,
                exc_info=None if isinstance(error, GradwireError) else error,
            )
            self._not_before = self._clock() + self._wait
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        finally:
            self._background = None
        # Commands went on meanwhile.
        self.applied()

    def _is_due(self, policy: CheckpointPolicy, now: float) -> bool:
        if self._model.number - self.newest >= policy.commands or now >= self._taken_at + policy.seconds:
            return True
        journal = self._model.journal
        return journal is not None and journal.size_after(self.newest) >= policy.journal_bytes

    def _wake_at(self, when: float) -> None:
        self._cancel_timer()
        delay = max(0.0, when - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay, self._woken)

    def _woken(self) -> None:
        self._timer = None
        self.applied()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.info("model %s was not saved: %s", self._model.model_id, error)
