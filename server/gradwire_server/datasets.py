"""The datasets of the service, by id: kept in the storage, from where ranks map them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradwire_proto.errors import AlreadyExists, DatasetNotFound, GradwireError, InvalidArgument
from gradwire_proto.names import check_dataset_id, dataset_name
from gradwire_proto.values import Batch, DatasetInfo
from gradwire_server.calls import Call
from gradwire_server.dataset_description import described
from gradwire_server.deletions import Deletion, Deletions
from gradwire_server.fingerprints import fits
from gradwire_server.model_storage import ModelStorage
from gradwire_server.pages import page_of
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.dataset_files import StoredDataset, is_unfinished, read_dataset, write_dataset
from gradwire_server.storage.durable_files import sync_folder
from gradwire_server.storage.saved_model import StoredReply
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.tensors.file_threads import in_thread
from gradwire_server.tensors.tensor_store import TensorStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Making:
    """A dataset that is being written, and the request that asked for it."""

    call: Call
    task: asyncio.Task[StoredDataset]


class Datasets:
    """See the module. Their bytes count as held: the setting held_bytes bounds them too.

    durable: whether a dataset, once it is made, outlives the machine.
    """

    def __init__(self, storage: ModelStorage, tensors: TensorStore, *, durable: bool, stored_replies: int) -> None:
        self._folder = storage.datasets
        self._check_fence = storage.check_fence
        self._tensors = tensors
        self._durable = durable
        self._stored: dict[str, StoredDataset] = {}
        self._making: dict[str, _Making] = {}
        self._made_by: dict[str, StoredDataset] = {}
        self._used: Counter[Path] = Counter()
        self._gone: set[Path] = set()
        self._expiring: dict[Path, asyncio.TimerHandle] = {}
        """Those that nobody uses, and that go if it stays so."""
        self._expirations: set[asyncio.Task[None]] = set()
        seen: RequestLog[Deletion] = RequestLog(stored_replies, 0)
        self._deletions = Deletions("DeleteDataset", seen, storage.deletions)

    def open(self, deletions: Iterable[StoredReply]) -> None:
        """Find those of the storage, and remove what was cut off half-way.

        deletions: requests that an earlier process of the service has answered, these among others.
        """
        self._deletions.restore(deletions)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            found: list[StoredDataset] = []
            for path in self._folder.iterdir():
                if is_unfinished(path):
                    shutil.rmtree(path, ignore_errors=True)
                    continue
                try:
                    found.append(read_dataset(path))
                except GradwireError as error:
                    logger.error("%s", error)
            for stored in sorted(found, key=lambda each: each.info.created_at, reverse=True):
                if stored.info.id in self._stored or stored.made_by in self._made_by:
                    # Its making failed, and it could not be removed; what was made after that is what clients know.
                    logger.warning("%s is there in a newer version: %s is removed", stored.info.id, stored.folder)
                    stored.forget(self._durable)
                    stored.remove()
                else:
                    self._take_in(stored)
        except OSError as error:
            raise storage_error(error, f"be opened ({self._folder})") from error

    def _take_in(self, stored: StoredDataset) -> None:
        self._stored[stored.info.id] = stored
        self._tensors.held.add(stored.info.nbytes)
        if stored.made_by is not None:
            self._made_by[stored.made_by] = stored
        self._expire_later(stored)

    async def create(self, dataset_id: str, batch: Batch, call: Call, *, ttl: float | None = None) -> DatasetInfo:
        """Keep the examples of `batch`; `dataset_id` "" lets the service choose. A repeat of the request joins it.

        ttl: seconds after which it goes if no fit uses it; None: it stays.

        Raises InvalidArgument for tensors that have no rows, or others than the first; AlreadyExists;
        ResourceExhausted HELD_BYTES_EXHAUSTED; errors of the storage, and FailedPrecondition MODEL_FENCED.
        """
        if call.request_id is not None:
            if (made := self._made_by.get(call.request_id)) is not None:
                _check_same(made.body, call)
                return made.info
            # Whatever id it chose.
            for making in self._making.values():
                if making.call.request_id == call.request_id:
                    _check_same(making.call.body, call)
                    return (await asyncio.shield(making.task)).info
        dataset_id = check_dataset_id(dataset_id or f"dataset-{secrets.token_hex(6)}")
        if dataset_id in self._making or dataset_id in self._stored:
            raise _exists(dataset_id)
        info = described(dataset_id, batch, ttl)
        task = asyncio.create_task(self._make(info, batch, call))
        self._making[dataset_id] = _Making(call, task)

        def made_or_not(task: asyncio.Task[StoredDataset]) -> None:
            del self._making[dataset_id]
            if not task.cancelled():
                task.exception()  # Looked at, where nobody waits for it any more.

        task.add_done_callback(made_or_not)
        return (await asyncio.shield(task)).info

    async def _make(self, info: DatasetInfo, batch: Batch, call: Call) -> StoredDataset:
        """To its end, whoever waits: a repeat of the request finds it."""
        claim = self._tensors.uploads.claim({"inputs": batch.inputs, "targets": batch.targets}, "batch")
        key = secrets.token_hex(16)
        draft = self._folder / f".new-{key}"
        stored = StoredDataset(
            info=info,
            folder=self._folder / key,
            upload=f"uploads/dataset-{key}",
            fingerprint=b"",
            made_by=call.request_id,
            body=call.body,
        )
        # What was uploaded is counted there, until it is here.
        counted = 0 if claim.taken else info.nbytes
        try:
            self._tensors.held.reserve(counted)
        except BaseException:
            claim.give_back()
            raise
        try:
            stored = await in_thread(self._write, draft, stored, Batch(**claim.value))
        except BaseException as error:
            claim.give_back()
            self._tensors.held.release(counted)
            if isinstance(error, OSError):
                raise storage_error(error, f"hold datasets/{info.id}") from error
            raise
        claim.spend()
        self._tensors.held.release(counted)
        self._take_in(stored)
        return stored

    def _write(self, draft: Path, stored: StoredDataset, batch: Batch) -> StoredDataset:
        try:
            draft.mkdir(mode=0o700)
            stored = write_dataset(draft, stored, batch, durable=self._durable)
            self._check_fence()
            os.rename(draft, stored.folder)
            if self._durable:
                sync_folder(self._folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            # Where all that failed is the last fsync, a restart would find it.
            with suppress(OSError):
                stored.forget(self._durable)
            stored.remove()
            raise
        return stored

    def get(self, dataset_id: str, field: str = "name") -> StoredDataset:
        """The dataset. Raises DatasetNotFound."""
        stored = self._stored.get(dataset_id)
        if stored is None:
            name = dataset_name(dataset_id)
            raise DatasetNotFound(f"there is no dataset {dataset_id!r}", field=field, resource=name)
        return stored

    def page(self, size: int, token: str) -> tuple[list[DatasetInfo], str]:
        """(datasets ordered by id, the next page's token or ""). `size` 0: as many as is good."""
        page, next_page_token = page_of(self._stored, size, token)
        return [each.info for each in page], next_page_token

    @contextmanager
    def used(self, stored: StoredDataset) -> Iterator[None]:
        """Inside, the dataset's files stay, even when it is deleted."""
        self._used[stored.path] += 1
        self._expires_no_more(stored)
        try:
            yield
        finally:
            self._used[stored.path] -= 1
            if not self._used[stored.path]:
                del self._used[stored.path]
                if stored.path in self._gone:
                    self._gone.discard(stored.path)
                    stored.remove()
                else:
                    self._expire_later(stored)

    def _expire_later(self, stored: StoredDataset) -> None:
        if stored.info.ttl is not None:
            later = asyncio.get_running_loop().call_later(stored.info.ttl, self._expire, stored)
            self._expiring[stored.path] = later

    def _expires_no_more(self, stored: StoredDataset) -> None:
        if (later := self._expiring.pop(stored.path, None)) is not None:
            later.cancel()

    def _expire(self, stored: StoredDataset) -> None:
        async def delete() -> None:
            try:
                await self.delete(stored.info.id, Call())
                logger.info("%s was not used for %g s and is deleted", dataset_name(stored.info.id), stored.info.ttl)
            except GradwireError as error:
                logger.warning("%s cannot be deleted: %s", dataset_name(stored.info.id), error)
                if self._stored.get(stored.info.id) is stored:
                    self._expire_later(stored)

        del self._expiring[stored.path]
        self._expirations.add(task := asyncio.get_running_loop().create_task(delete()))
        task.add_done_callback(self._expirations.discard)

    async def delete(self, dataset_id: str, call: Call) -> None:
        """Delete a dataset: nobody finds it any more. Fits that use it go on, and journals keep what they need of it.

        A repeat of a request id leaves alone what was made since. Raises DatasetNotFound, and FailedPrecondition
        MODEL_FENCED.
        """
        if await self._deletions.is_repeated(call):
            return
        stored = self.get(dataset_id)
        await self._deletions.run(dataset_id, lambda: self._delete(stored), call)

    async def close(self) -> None:
        """Wait for what is being made or deleted."""
        # First: each that is made begins to expire.
        await asyncio.gather(*(each.task for each in self._making.values()), return_exceptions=True)
        for later in self._expiring.values():
            later.cancel()
        self._expiring.clear()
        await asyncio.gather(*self._expirations)
        await self._deletions.close()

    async def _delete(self, stored: StoredDataset) -> None:
        try:
            await in_thread(self._forget, stored)
        except OSError as error:
            raise storage_error(error, f"let go of {dataset_name(stored.info.id)}") from error
        del self._stored[stored.info.id]
        self._expires_no_more(stored)
        if stored.made_by is not None:
            self._made_by.pop(stored.made_by, None)
        self._tensors.held.release(stored.info.nbytes)
        if stored.path in self._used:
            self._gone.add(stored.path)
        else:
            await in_thread(stored.remove)

    def _forget(self, stored: StoredDataset) -> None:
        self._check_fence()
        stored.forget(self._durable)


def _check_same(body: bytes, call: Call) -> None:
    """InvalidArgument where the request whose fingerprint is `body` was another than `call`, with the same id."""
    if not fits(body, call.body, call.method, call.raw):
        raise InvalidArgument(
            f"{call.request_id} was the id of another request; each needs its own",
            field="request_id",
            reason="REQUEST_ID_REUSED",
        )


def _exists(dataset_id: str) -> AlreadyExists:
    return AlreadyExists(
        f"there is a dataset {dataset_id!r} already",
        field="dataset_id",
        reason="DATASET_EXISTS",
        resource=dataset_name(dataset_id),
    )
