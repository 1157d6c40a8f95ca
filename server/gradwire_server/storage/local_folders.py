"""Folders of a POSIX file system: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.checkpoint_folders import is_key, place, storage_errors, taken
from gradwire_server.storage.durable_files import link_or_copy, sync_folder
from gradwire_server.storage.manifest import MANIFEST

_PARTIAL = ".partial"
"""Holds what is being written, and what is being removed."""

_READING = ".reading"
"""Holds links to what is being read, so that deleting a checkpoint takes nothing from its readers."""

_REPLACED = ".replaced"
"""Holds a folder while another takes its place."""

_FLUSH_BYTES = 32 << 20
"""Written pages are flushed so often: whoever else flushes a file meanwhile never waits for more than these."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class LocalFolders:
    """See `Folders`. cache: a folder elsewhere, for files that are read while there is no room for links.

    owner: whose automatic ones these are, and whose half-written and half-read ones are swept. fence: raises where
    another service has taken over this storage; then nothing is made visible or removed.
    """

    def __init__(self, root: Path, cache: Path, owner: str, fence: Callable[[], None]) -> None:
        self._root = root
        self._cache = cache
        self._owner = owner
        self._fence = fence
        with self._errors():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def draft(self, key: str, *, replace: bool) -> Iterator[_LocalDraft]:
        with self._errors():
            if not replace and self._path(key).exists():
                raise taken(key)
            path = self._new(_PARTIAL)
            try:
                yield _LocalDraft(self, key, path, replace)
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def manifest(self, key: str) -> bytes | None:
        with self._errors():
            try:
                return (self._path(key) / MANIFEST).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def keys(self, prefix: str) -> list[str]:
        with self._errors():
            keys = (key for key in self._folders() if key.startswith(prefix))
            return sorted(key for key in keys if (self._path(key) / MANIFEST).is_file())

    def fetch(self, key: str, names: Mapping[str, str]) -> Path:
        with self._errors():
            try:
                return _fetched(self._path(key), names, self._own(_READING), link_or_copy)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
            # A full disk must not keep a model from being restored.
            return _fetched(self._path(key), names, self._cache, shutil.copyfile)

    def delete(self, key: str) -> None:
        with self._errors():
            self._fence()
            trash = self._new(_PARTIAL)
            try:
                # The rename takes it away whole; what comes after is only room.
                os.rename(self._path(key), trash)
                if key.startswith("auto/"):
                    with contextlib.suppress(OSError):
                        # Of a model that has none any more.
                        os.rmdir(self._path(key).parent)
            except FileNotFoundError:
                pass
            finally:
                shutil.rmtree(trash, ignore_errors=True)

    def sweep(self) -> None:
        with self._errors():
            shutil.rmtree(self._cache, ignore_errors=True)
            for name in _names(self._own(_REPLACED)):
                with contextlib.suppress(OSError):
                    os.rename(self._own(_REPLACED) / name, self._path(name.replace("@", "/")))
            for name in (_PARTIAL, _READING, _REPLACED):
                shutil.rmtree(self._own(name), ignore_errors=True)
            for key in self._folders():
                if not (self._path(key) / MANIFEST).is_file():
                    shutil.rmtree(self._path(key))
            models = [self._path(f"auto/{model_id}") for model_id in _names(self._path("auto/"))]
            for folder in (*models, self._path("auto/")):
                with contextlib.suppress(OSError):
                    # Of a model, or an owner, that has none any more.
                    os.rmdir(folder)

    def show(self, path: Path, key: str, *, replace: bool) -> None:
        """Rename the folder `path` to what `key` names, durably."""
        target = self._path(key)
        aside = self._own(_REPLACED) / key.replace("/", "@")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fence()
        if replace and target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(target, aside)
        try:
            _rename_new(path, target, key)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rename(aside, target)
            raise
        for folder in (target.parent, *target.parent.parents):
            sync_folder(folder)
            if folder == self._root:
                break
        shutil.rmtree(aside, ignore_errors=True)

    def _folders(self) -> list[str]:
        """Every key that there may be. Other folders are not ours."""
        named = [f"named/{name}" for name in _names(self._root / "named")]
        models = [f"auto/{model_id}" for model_id in _names(self._path("auto/"))]
        found = named + [f"{model}/{number}" for model in models for number in _names(self._path(model))]
        return list(filter(is_key, found))

    def _path(self, key: str) -> Path:
        return self._root / place(key, self._owner)

    def _own(self, below: str) -> Path:
        return self._root / below / self._owner

    def _new(self, below: str) -> Path:
        path = self._own(below) / secrets.token_hex(8)
        path.mkdir(mode=0o700, parents=True)
        return path

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(str(self._root))


class _LocalDraft:
    """A folder that still has another name."""

    place = ""

    def __init__(self, folders: LocalFolders, key: str, path: Path, replace: bool) -> None:
        self._folders = folders
        self._key = key
        self._path = path
        self._replace = replace

    @contextmanager
    def file(self, name: str) -> Iterator[_LocalFile]:
        descriptor = os.open(self._path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield _LocalFile(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def commit(self, manifest: bytes) -> None:
        with self.file(MANIFEST) as file:
            file.write(manifest)
        sync_folder(self._path)
        self._folders.show(self._path, self._key, replace=self._replace)


class _LocalFile:
    """Bytes one behind the other, flushed as they come."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unflushed = 0

    def write(self, piece: bytes | memoryview) -> None:
        left = memoryview(piece)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._unflushed += len(piece)
        if self._unflushed >= _FLUSH_BYTES:
            os.fdatasync(self._descriptor)
            self._unflushed = 0


def _rename_new(path: Path, target: Path, key: str) -> None:
    """Rename a folder to what is not there yet."""
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise taken(key) from None
        if error.errno == errno.ENOENT:
            # Whoever takes over a storage sweeps it first.
            raise FailedPrecondition("another service has taken over this storage", reason="MODEL_FENCED") from None
        raise


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _fetched(source: Path, names: Mapping[str, str], parent: Path, get: Callable[[Path, Path], object]) -> Path:
    """A new folder in `parent` with those of the files that are there."""
    folder = parent / secrets.token_hex(8)
    folder.mkdir(mode=0o700, parents=True)
    try:
        for name, there in names.items():
            with contextlib.suppress(FileNotFoundError):
                get(source / there, folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
