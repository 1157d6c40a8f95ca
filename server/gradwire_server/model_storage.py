"""Where the models of a service are kept: a folder for each, and their checkpoints."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradwire_proto.errors import GradwireError
from gradwire_proto.names import check_model_id
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.deletion_notes import DeletionNotes
from gradwire_server.storage.durable_files import replace_file, sync_folder
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.saved_model import StoredReply, decode_replies, encode_replies
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.tensors.file_threads import in_thread

logger = logging.getLogger(__name__)

_MADE_BY = "made-by.bin"


class ModelStorage:
    """See the module. Methods may block, but for `folder` and those of the sweep, which belong to the event loop.

    folder: of one owner; None: the whole storage's.

    A model is there when its folder is: that is made last, behind its first checkpoint, and goes first. Errors are
    those of `storage_error` and of CheckpointStore.
    """

    def __init__(self, lock: StorageLock, checkpoints: CheckpointStore, folder: Path | None = None) -> None:
        self._lock = lock
        folder = lock.storage if folder is None else folder
        self._models = folder / "models"
        self.datasets = folder / "datasets"
        """A folder for those that have their own."""
        self.checkpoints = checkpoints
        self.deletions = DeletionNotes(lock, folder)
        self._swept: asyncio.Future[None] | None = None

    def open(self) -> dict[str, StoredReply | None]:
        """All models: by id, the request that made each, where it had an id. Removes what was cut off half-way."""
        try:
            self._models.mkdir(mode=0o700, exist_ok=True)
            for folder in self._models.glob(".*"):
                shutil.rmtree(folder, ignore_errors=True)
            ids = sorted(path.name for path in self._models.iterdir() if path.is_dir() and _is_model_id(path.name))
        except OSError as error:
            raise storage_error(error, f"be opened ({self._models})") from error
        return {model_id: self._made_by(model_id) for model_id in ids}

    def _made_by(self, model_id: str) -> StoredReply | None:
        try:
            return next(iter(decode_replies((self.folder(model_id) / _MADE_BY).read_bytes())), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("models/%s: the request that made it cannot be read: %s", model_id, error)
            return None

    def begin_sweep(self) -> None:
        """Remove, in the background, checkpoints that no model has any more, and what was left half-written."""
        self._swept = asyncio.ensure_future(in_thread(self._sweep, threads=self.checkpoints.threads))

    async def swept(self) -> None:
        """Return when nothing is removed in the background any more: only then may checkpoints be written."""
        if self._swept is not None:
            await asyncio.wait([self._swept])

    def _sweep(self) -> None:
        try:
            self.checkpoints.sweep()
            for model_id in {each.model_id for each in self.checkpoints.list("auto/")}:
                if not self.folder(model_id).exists():
                    self.checkpoints.delete_automatic(model_id)
        except GradwireError as error:
            logger.warning("checkpoints that nobody needs could not be removed: %s", error)

    def folder(self, model_id: str) -> Path:
        """The model's own folder."""
        return self._models / model_id

    def make(self, model_id: str, made_by: StoredReply | None) -> None:
        """A new model, whose first checkpoint is there, is there from now on."""
        self.check_fence()
        draft = self._models / f".new-{secrets.token_hex(8)}"
        try:
            draft.mkdir(mode=0o700)
            replace_file(draft / _MADE_BY, b"".join(encode_replies((made_by,) if made_by else ())))
            os.rename(draft, self.folder(model_id))
            sync_folder(self._models)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise storage_error(error, f"hold a new model ({self._models})") from error

    def open_journal(self, model_id: str, durability: str, after: int) -> tuple[Journal, Iterator[Entry]]:
        """See Journal.open."""
        return Journal.open(self.folder(model_id), self._lock, durability=durability, after=after)

    def delete(self, model_id: str) -> None:
        """Remove a model, its journal and the checkpoints that were taken of themselves. One that is gone is fine.

        An error has the outcome "unknown" once the model itself is gone: then it comes back no more.
        """
        self.check_fence()
        gone = self._models / f".deleted-{secrets.token_hex(8)}"
        try:
            os.rename(self.folder(model_id), gone)
            sync_folder(self._models)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, f"let go of models/{model_id}") from error
        shutil.rmtree(gone, ignore_errors=True)
        try:
            self.checkpoints.delete_automatic(model_id)
        except GradwireError as error:
            error.outcome = "unknown"
            raise

    def check_fence(self) -> None:
        """Raises where another frontend has taken over: what has this name is another's."""
        try:
            self._lock.check()
        except GradwireError as error:
            error.outcome = "not_applied"
            raise


def _is_model_id(name: str) -> bool:
    try:
        return check_model_id(name) == name
    except GradwireError:
        return False
