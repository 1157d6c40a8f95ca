"""Which requests have deleted something, so that their repeats do not delete what was made since."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from gradwire_server.storage.durable_files import replace_file
from gradwire_server.storage.saved_model import StoredReply, decode_replies, encode_replies
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.storage.storage_lock import StorageLock

logger = logging.getLogger(__name__)

KEEP_SECONDS = 3600.0


class DeletionNotes:
    """A small file for each, which is kept for an hour. Methods block, and any thread may call them."""

    def __init__(self, lock: StorageLock, folder: Path | None = None) -> None:
        self._lock = lock
        self._folder = (folder or lock.storage) / "deletions"
        self._written: deque[tuple[float, Path]] = deque()
        self._one_at_a_time = threading.Lock()

    def open(self) -> tuple[StoredReply, ...]:
        """All that there are, oldest first; those that are too old, or cut off, are removed."""
        found = []
        try:
            for path in self._folder.iterdir() if self._folder.exists() else ():
                note = _read(path)
                if note is not None and (note.ended_at or 0.0) >= time.time() - KEEP_SECONDS:
                    found.append((note.ended_at, path, note))
                    continue
                with suppress(OSError):  # The next start tries again.
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, f"be opened ({self._folder})") from error
        found.sort(key=lambda each: each[:2])
        self._written.extend(each[:2] for each in found)
        return tuple(note for _, _, note in found)

    def write(self, note: StoredReply) -> None:
        """Keep what became of a request with an id. Errors of `storage_error`; FailedPrecondition MODEL_FENCED."""
        now, path = time.time(), self._folder / f"{note.request_id}.bin"
        self._lock.check()
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            replace_file(path, b"".join(encode_replies((note,))))
            with self._one_at_a_time:
                self._written.append((now, path))
                while self._written[0][0] < now - KEEP_SECONDS:
                    self._written.popleft()[1].unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, "note what was deleted", outcome="applied") from error


def _read(path: Path) -> StoredReply | None:
    try:
        (note,) = decode_replies(path.read_bytes())
        return note
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: what was deleted cannot be read: %s", path, error)
        return None
