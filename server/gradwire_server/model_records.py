"""One model's journal, as its commands use it: what has not been recorded yet, and what becomes of a broken one."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import Segment, TensorData
from gradwire_server.fingerprints import file_fingerprint
from gradwire_server.storage.dataset_files import StoredDataset
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry, StoredTensor, StoredUpload
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.tensors.file_threads import in_thread, move_bytes
from gradwire_server.tensors.held_files import segment_paths
from gradwire_server.work_queue import Job

logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two attempts to mend a journal."""

AHEAD_BYTES = 1 << 20
"""Requests that are larger are written in a thread. A smaller one takes less time than that costs."""


def takes_long(nbytes: int) -> bool:
    """Whether a request of so many bytes should be written in a thread."""
    return nbytes > AHEAD_BYTES


class ModelRecords:
    """See the module. Without a journal, of a model that outlives nothing, nothing is recorded.

    save: takes a checkpoint of the model as it is, in the turn of a request, and starts the journal anew behind it.
    take_turn: has what it is given run in a turn.
    """

    def __init__(
        self, save: Callable[[], Awaitable[None]], take_turn: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
    ) -> None:
        self.journal: Journal | None = None
        self.unsettled: asyncio.Future[None] | None = None
        """The newest record that does not outlive yet what it should; what was answered before does."""
        self._save = save
        self._take_turn = take_turn
        self._unsaved: dict[Job[Any], tuple[int, bool]] = {}
        """Jobs whose record is not what it should be, and may never be: Entry.number and Entry.unnumbered of each."""
        self._doubtful: set[Job[Any]] = set()
        """Jobs whose commands are undone, and whose records a restart may find all the same."""
        self._undone: set[Job[Any]] = set()
        """Jobs that have not ended, and whose commands are undone for good."""
        self._next_try = 0.0

    async def usable(self) -> None:
        """Return when commands can be recorded, and what is read is nobody else's to change. Raises why not: nothing
        was applied.
        """
        if self.journal is None:
            return
        try:
            if self.journal.broken is None:
                self.journal.check_lock()
            else:
                await self._mend()
        except GradwireError as error:
            error.outcome = "not_applied"
            raise

    async def keep(
        self, uploads: Mapping[str, Sequence[TensorData]], dataset: StoredDataset | None = None
    ) -> tuple[StoredUpload, ...]:
        """Keep the uploads that a command names for as long as its record, and the dataset that it goes through."""
        if self.journal is None:
            return ()
        kept: list[StoredUpload] = []
        try:
            for name, tensors in uploads.items():
                kept.append(await self._keep(self.journal, name, tensors))
            if dataset is not None:
                kept.append(await self._keep_dataset(self.journal, dataset))
        except BaseException:
            self.drop(kept)
            raise
        return tuple(kept)

    async def _keep(self, journal: Journal, name: str, tensors: Sequence[TensorData]) -> StoredUpload:
        file, check, paths = "", None, segment_paths(tensors)
        if paths:
            (path,) = paths
            nbytes = sum(tensor.nbytes for tensor in tensors)
            keep = _kept, journal, Path(path), name
            file, check = await (in_thread(*keep) if journal.waits_for_disk else move_bytes(nbytes, *keep))
        return StoredUpload(name=name, file=file, tensors=tuple(map(_stored, tensors)), fingerprint=check)

    async def _keep_dataset(self, journal: Journal, dataset: StoredDataset) -> StoredUpload:
        keep = journal.keep_upload, dataset.path, dataset.upload
        # Linked: that takes no time, but for an fsync, or where it has to be copied.
        file = await in_thread(*keep) if journal.waits_for_disk else await move_bytes(dataset.info.nbytes, *keep)
        tensors = tuple(map(_stored, dataset.tensors))
        return StoredUpload(name=dataset.upload, file=file, tensors=tensors, fingerprint=dataset.fingerprint)

    def drop(self, uploads: Sequence[StoredUpload]) -> None:
        """The command that they were kept for leaves no record."""
        if self.journal is not None:
            for upload in uploads:
                if upload.file:
                    self.journal.drop_upload(upload.file)

    def reserve(self, nbytes: int, uploads: Sequence[StoredUpload]) -> None:
        """See that a record with so many bytes of request and reply, which names these uploads, can be written."""
        if self.journal is not None:
            self.journal.reserve(nbytes, uploads)

    async def write(self, entry: Entry) -> None:
        """Do what takes long of `append`, which comes next, without holding up other models."""
        if self.journal is not None and takes_long(len(entry.request)):
            await in_thread(self.journal.write_ahead, entry)

    def append(self, entry: Entry, job: Job[Any]) -> asyncio.Future[None] | None:
        """Record a command. None: it outlives what it should; otherwise a future that is done when it does.

        The future ends with the error of the storage, outcome "unknown", where that cannot be had; `job` is confirmed
        when it can be later.
        """
        return self.append_all([entry], [job])[0]

    def append_all(self, entries: Sequence[Entry], jobs: Sequence[Job[Any]]) -> list[asyncio.Future[None] | None]:
        """The same for several, with one write."""
        if self.journal is None:
            return [None] * len(jobs)
        try:
            written = self.journal.append_all(entries)
        except GradwireError as error:
            self._wait_for(entries, jobs)
            return [asyncio.ensure_future(self._mended(error, job)) for job in jobs]
        if written is None:
            return [None] * len(jobs)
        self._wait_for(entries, jobs)
        settled: list[asyncio.Future[None] | None] = []
        for job in jobs:
            self.unsettled = asyncio.ensure_future(self._settled(written, job))
            self.unsettled.add_done_callback(self._forget)
            settled.append(self.unsettled)
        return settled

    def _wait_for(self, entries: Sequence[Entry], jobs: Sequence[Job[Any]]) -> None:
        for entry, job in zip(entries, jobs, strict=True):
            self._unsaved[job] = (entry.number, entry.unnumbered)

    def _forget(self, settled: asyncio.Future[None]) -> None:
        if self.unsettled is settled:
            self.unsettled = None

    async def _settled(self, written: asyncio.Future[None], job: Job[Any]) -> None:
        try:
            await asyncio.shield(written)
            self._unsaved.pop(job, None)
        except GradwireError as error:
            await self._mended(error, job)

    async def _mended(self, error: GradwireError, job: Job[Any]) -> None:
        """The model is ahead of its journal: it is not when a checkpoint of it was taken."""
        with suppress(GradwireError):
            await self._take_turn(self.usable)
        if job in self._undone:
            self._undone.discard(job)
            raise _undone(error)
        if job in self._unsaved or job in self._doubtful:
            error = copy.copy(error)
            error.outcome = "unknown"
            raise error

    async def _mend(self) -> None:
        assert self.journal is not None and self.journal.broken is not None
        if time.monotonic() < self._next_try:
            raise copy.copy(self.journal.broken)
        try:
            await self._save()
        except BaseException:
            self._next_try = time.monotonic() + PAUSE
            raise
        unsaved, self._unsaved = self._unsaved, {}
        for job in unsaved:
            if job.ended:
                job.confirm()
        # The journal goes on behind a checkpoint that does not hold them.
        self._undo_doubtful()

    async def try_to_mend(self) -> None:
        """Have the journal mended in a turn, where it is broken and can be."""
        if self.journal is not None and self.journal.broken is not None:
            with suppress(GradwireError):
                await self._take_turn(self.usable)

    def saved(self, number: int) -> None:
        """A checkpoint holds all commands up to this number."""
        # What has no number of its own came behind the command of that number, perhaps later than the checkpoint.
        for job in [job for job, its in self._unsaved.items() if its <= (number, False)]:
            del self._unsaved[job]
            if job.ended:
                job.confirm()

    async def goes_back_to(self, number: int) -> None:
        """Commands behind this number are undone: they may be tried again, once no restart finds a record of them."""
        behind = {job for job, (its_number, _) in self._unsaved.items() if its_number > number}
        for job in behind:
            del self._unsaved[job]
            job.undo()
        self._doubtful |= behind
        if self.journal is None or not self._doubtful:
            return
        try:
            await in_thread(self.journal.cut_end)
        except GradwireError as error:
            logger.warning("commands that were undone may come back before the journal is mended: %s", error)
        else:
            self._undo_doubtful()

    def _undo_doubtful(self) -> None:
        doubtful, self._doubtful = self._doubtful, set()
        for job in doubtful:
            if job.ended:
                job.error = _undone(job.error)
            else:
                self._undone.add(job)

    def close(self) -> None:
        """Close the journal. Idempotent."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def _kept(journal: Journal, path: Path, name: str) -> tuple[str, bytes]:
    """Keep an upload in `path`: its file among the journal's blobs, and that one's fingerprint."""
    file = journal.keep_upload(path, name)
    try:
        return file, file_fingerprint(journal.blobs.path(file))
    except OSError as error:
        journal.drop_upload(file)
        raise storage_error(error, "read the command's upload") from error


def _undone(error: GradwireError | None) -> GradwireError:
    assert error is not None
    error = copy.copy(error)
    error.outcome, error.retryable = "not_applied", True
    return error


def stored_tensors(upload: StoredUpload, journal: Journal) -> list[TensorData]:
    """The tensors of an upload that a record names."""
    path = str(journal.blobs.path(upload.file)) if upload.file else ""
    return [
        TensorData(each.dtype, each.shape, Segment(path, each.offset, each.nbytes) if each.nbytes else b"")
        for each in upload.tensors
    ]


def _stored(tensor: TensorData) -> StoredTensor:
    offset = tensor.data.offset if isinstance(tensor.data, Segment) else 0
    return StoredTensor(dtype=tensor.dtype, shape=tuple(tensor.shape), offset=offset, nbytes=tensor.nbytes)
