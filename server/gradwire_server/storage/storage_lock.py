"""Who may write to the storage: one frontend at a time, and none that was taken over from."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.durable_files import replace_file
from gradwire_server.storage.group_commit import GroupCommit
from gradwire_server.storage.storage_errors import storage_error

FORMAT = "gradwire-storage 1"
_ID = re.compile(r"[0-9a-f]{16}")
_POLL_SECONDS = 0.05


class StorageLock:
    """This frontend's hold on the storage folder, and what its journals share.

    Two guards. A lock of the system (flock) on `lock`, which goes with its process, keeps two frontends from starting
    side by side. The number in `epoch`, replaced at every start, keeps one that slept from going on: it writes first
    and then looks whether the number is still its own, the new one replaces the number first and then reads. So a
    record of the old one is either read by the new one, or never acknowledged.
    """

    def __init__(self, storage: Path, lock: IO[bytes], epoch: int, storage_id: str) -> None:
        self.storage = storage
        self.storage_id = storage_id
        """Of this storage and no other, for as long as it is there."""
        self.epoch = epoch
        self.commits = GroupCommit()
        """Where journals at durability "disk" wait for their fsync."""
        self._lock = lock
        self._path = os.fspath(storage / "epoch")
        self._mark = _mark(self._path)

    @classmethod
    def take(cls, storage: Path, patience: float) -> StorageLock:
        """Become the one that writes, waiting up to `patience` seconds for another to leave; makes what is missing.

        FailedPrecondition STORAGE_LOCKED, or STORAGE_VERSION where another version wrote the folder; errors of
        `storage_error`. Blocks.
        """
        try:
            storage.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_format(storage)
            lock = _flock(storage / "lock", patience)
            try:
                if not (storage / "format").exists():
                    replace_file(storage / "format", f"{FORMAT}\n".encode())
                if not (storage / "id").exists():
                    replace_file(storage / "id", f"{secrets.token_hex(8)}\n".encode())
                storage_id = _read_id(storage / "id")
                epoch = _read_epoch(storage / "epoch") + 1
                replace_file(storage / "epoch", f"{epoch}\n".encode())
                return cls(storage, lock, epoch, storage_id)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise storage_error(error, f"be locked ({storage})") from error

    def check(self) -> None:
        """Raises FailedPrecondition MODEL_FENCED once another frontend has taken over. One stat."""
        try:
            if _mark(self._path) == self._mark:
                return
        except OSError as error:
            raise storage_error(error, "be checked for another frontend", outcome="unknown") from error
        raise FailedPrecondition(
            "another frontend has taken over the storage; what this one did last may not be in it",
            reason="MODEL_FENCED",
            outcome="unknown",
        )

    def release(self) -> None:
        """Let another frontend in, after all that waits for its fsync. The journals are closed before."""
        self.commits.close()
        self._lock.close()


def _mark(path: str) -> tuple[int, int, int]:
    """What differs once a file was replaced."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _check_format(storage: Path) -> None:
    try:
        found = (storage / "format").read_text(errors="replace").strip()
    except FileNotFoundError:
        if not any(storage.glob("models/*")) and not any(storage.glob("checkpoints/*")):
            return
        found = ""
    if found != FORMAT:
        raise FailedPrecondition(
            f"{storage} is {found[:80]!r}; this service reads and writes {FORMAT!r}", reason="STORAGE_VERSION"
        )


def _flock(path: Path, patience: float) -> IO[bytes]:
    """The open and locked file; it holds the process id, for whoever looks why it is locked."""
    file = open(path, "a+b")  # noqa: SIM115 (it stays open as long as the lock is held)
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise FailedPrecondition(
                        f"{path.parent} is in use by another service (process {_holder(file)})",
                        reason="STORAGE_LOCKED",
                    ) from None
                time.sleep(_POLL_SECONDS)
        with suppress(OSError):  # A disk that is full is no reason to refuse.
            file.truncate(0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        return file
    except BaseException:
        file.close()
        raise


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(32).decode(errors="replace").strip() or "unknown"


def _read_id(path: Path) -> str:
    text = path.read_text(errors="replace").strip()
    if not _ID.fullmatch(text):
        raise FailedPrecondition(f"{path} should hold an id and holds {text[:40]!r}", reason="STORAGE_VERSION")
    return text


def _read_epoch(path: Path) -> int:
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return 0
    if not (text.isascii() and text.isdigit()):
        raise FailedPrecondition(f"{path} should hold a number and holds {text[:40]!r}", reason="STORAGE_VERSION")
    return int(text)
