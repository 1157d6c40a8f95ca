"""Folders of an object store, or of whatever else fsspec reaches: the manifest comes last and goes first.

A store of objects renames nothing, but shows an object whole or not at all: a folder without its manifest is none.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from gradwire_proto.errors import Unavailable
from gradwire_server.config import ConfigError
from gradwire_server.storage.bounded_calls import BoundedCalls
from gradwire_server.storage.checkpoint_folders import place, storage_errors, taken
from gradwire_server.storage.manifest import MANIFEST

_PIECE_BYTES = 8 << 20


class ObjectFolders:
    """See `Folders`. url, options: as fsspec takes them. cache: where files are fetched to, and where it is noted which
    named ones are half-written: only these are swept, for other services may write, too.

    owner: whose automatic ones these are. fence: raises where another service has taken over; then nothing is made
    visible or removed. patience: seconds that one call of the store may take; a file takes one for every few MiB.
    """

    def __init__(
        self, url: str, options: Mapping[str, str], cache: Path, owner: str, fence: Callable[[], None], patience: float
    ) -> None:
        self._url = url
        self._cache = cache
        self._owner = owner
        self._fence = fence
        self._bounded = BoundedCalls(patience)
        self._files, self._root = _file_system(url, options)

    @contextmanager
    def draft(self, key: str, *, replace: bool) -> Iterator[_ObjectDraft]:
        with self._errors():
            if not replace and self.call("exists", self.path(key, MANIFEST)):
                raise taken(key)
            # Files of two writers must never be taken for one's.
            self.delete(key)
            note = self._note(key)
            with contextlib.suppress(OSError):  # A full disk: what is cut off then stays until somebody takes the name.
                note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                note.touch()
            draft = _ObjectDraft(self, key)
            try:
                yield draft
            except (TimeoutError, Unavailable):
                # What does not answer is not asked to remove anything: whoever writes there next does, or sweeps.
                raise
            except BaseException:
                if not draft.shown:
                    with contextlib.suppress(Exception):
                        self._remove(key)
                        note.unlink(missing_ok=True)
                raise
            note.unlink(missing_ok=True)

    def manifest(self, key: str) -> bytes | None:
        with self._errors():
            try:
                return self.call("cat_file", self.path(key, MANIFEST))
            except FileNotFoundError:
                return None

    def keys(self, prefix: str) -> list[str]:
        with self._errors():
            return sorted(key for key, names in self._found(prefix).items() if MANIFEST in names)

    def fetch(self, key: str, names: list[str]) -> Path:
        with self._errors():
            folder = self._cache / secrets.token_hex(8)
            folder.mkdir(mode=0o700, parents=True)
            try:
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        self._fetch_file(self.path(key, name), folder / name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder

    def delete(self, key: str) -> None:
        with self._errors():
            self._fence()
            self._remove(key)

    def sweep(self) -> None:
        with self._errors():
            for key, names in self._found("").items():
                if MANIFEST not in names and (key.startswith("auto/") or self._note(key).exists()):
                    self._fence()
                    self._remove(key)
        shutil.rmtree(self._cache, ignore_errors=True)

    def show(self, key: str, manifest: bytes) -> None:
        """Put the manifest of a folder whose files are there."""
        self._fence()
        with storage_errors(self._url, outcome="unknown"):
            self.call("pipe_file", self.path(key, MANIFEST), manifest)

    def path(self, key: str, name: str) -> str:
        """What the store calls a file."""
        return self._below_root(f"{place(key, self._owner)}/{name}")

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the store, past what it remembers."""
        return self._wait(self._call, method, arguments, options)

    def bounded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something of the store's own, such as an open file's method."""
        return self._wait(function, *arguments)

    def _call(self, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._files.invalidate_cache()
        return getattr(self._files, method)(*arguments, **options)

    def _wait(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._bounded(function, *arguments)
        except (FileNotFoundError, TimeoutError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            # Client libraries have errors of their own. Their texts may hold signatures and keys.
            number = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
            raise OSError(number, type(error).__name__) from error

    def _found(self, prefix: str) -> dict[str, set[str]]:
        """The names of the files of every folder."""
        folders: dict[str, set[str]] = {}
        for each in [prefix] if prefix else ["auto/", "named/"]:
            kind = each.partition("/")[0]
            start = len(self._below_root(place(f"{kind}/", self._owner)))
            try:
                paths = self.call("find", self._below_root(place(each, self._owner)).rstrip("/"))
            except FileNotFoundError:
                continue
            for path in paths:
                key, _, name = f"{kind}/{path[start:]}".rpartition("/")
                if _is_key(key) and key.startswith(prefix):
                    folders.setdefault(key, set()).add(name)
        return folders

    def _below_root(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root else path

    def _note(self, key: str) -> Path:
        """What is there while the folder is being written."""
        return self._cache / key.replace("/", "@")

    def _remove(self, key: str) -> None:
        names = self._found(key).get(key, set())
        for name in sorted(names, key=lambda name: name != MANIFEST):
            with contextlib.suppress(FileNotFoundError):
                self.call("rm_file", self.path(key, name))

    def _fetch_file(self, path: str, target: Path) -> None:
        size = self.call("info", path)["size"]
        with open(target, "xb") as file:
            for start in range(0, size, _PIECE_BYTES):
                file.write(self.call("cat_file", path, start=start, end=min(start + _PIECE_BYTES, size)))

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(self._url)


class _ObjectDraft:
    """A folder without a manifest."""

    def __init__(self, folders: ObjectFolders, key: str) -> None:
        self._folders = folders
        self._key = key
        self._sizes: dict[str, int] = {}
        self.shown = False
        """Whether the manifest was, perhaps, put."""

    @contextmanager
    def file(self, name: str) -> Iterator[_ObjectFile]:
        path = self._folders.path(self._key, name)
        opened = self._folders.call("open", path, "wb")
        file = _ObjectFile(self._folders, opened)
        try:
            yield file
            self._folders.bounded(opened.close)
        except TimeoutError:
            _abandon(opened)
            raise
        except BaseException:
            with contextlib.suppress(Exception):
                self._folders.bounded(opened.discard)
            _abandon(opened)
            raise
        self._sizes[name] = file.nbytes

    def commit(self, manifest: bytes) -> None:
        for name, nbytes in self._sizes.items():
            size = self._folders.call("info", self._folders.path(self._key, name))["size"]
            if size != nbytes:
                raise OSError(f"{name} has {size} bytes after {nbytes} were written")
        self.shown = True
        self._folders.show(self._key, manifest)


class _ObjectFile:
    """Bytes one behind the other, and how many there were."""

    def __init__(self, folders: ObjectFolders, opened: Any) -> None:
        self._folders = folders
        self._opened = opened
        self.nbytes = 0

    def write(self, piece: bytes | memoryview) -> None:
        self._folders.bounded(self._opened.write, piece)
        self.nbytes += len(piece)


def _abandon(opened: Any) -> None:
    """Keep a file that was not written to its end from being put when it is collected."""
    with contextlib.suppress(Exception):
        opened.closed = True


def _is_key(key: str) -> bool:
    kind, _, rest = key.partition("/")
    return bool(rest) and {"auto": 1, "named": 0}.get(kind) == rest.count("/")


def _file_system(url: str, options: Mapping[str, str]) -> tuple[Any, str]:
    """(fsspec's file system, the path of the root in it). ConfigError where fsspec does not know the URL's kind."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"checkpoint_url: {error}: {url}") from None
    return files, str(root).rstrip("/")
