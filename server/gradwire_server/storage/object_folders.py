"""Folders of an object store, or of whatever else fsspec reaches: the manifest comes last and goes first.

A store of objects renames nothing, but shows an object whole or not at all: a folder without its manifest is none. Each
write has names of its own (see object_places.py). Only the manifest of a named one has a name that all know who share
it: whoever puts it first has the name.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from gradwire_proto.errors import Unavailable
from gradwire_server.config import ConfigError
from gradwire_server.storage.bounded_calls import BoundedCalls
from gradwire_server.storage.checkpoint_folders import is_key, place, storage_errors, taken
from gradwire_server.storage.manifest import MANIFEST
from gradwire_server.storage.object_draft import ObjectDraft
from gradwire_server.storage.object_places import OpenWrites, new_place, place_of

_PIECE_BYTES = 8 << 20
_LOOKS = 3
"""How often a manifest is looked for that was there."""


class ObjectFolders:
    """See `Folders`. url, options: as fsspec takes them. cache: where files are fetched to; beside it is noted
    which writes are open: of named ones only these are swept, for other services may write, too.

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
        self._open = OpenWrites(cache.with_name("open-writes"))
        self._files, self._root = _file_system(url, options)
        self._creates = "mode" in signature(self._files.pipe_file).parameters

    @contextmanager
    def draft(self, key: str, *, replace: bool) -> Iterator[ObjectDraft]:
        with self._errors():
            if not replace and self.call("exists", self.path(key, MANIFEST)):
                raise taken(key)
            draft = ObjectDraft(self, key, new_place())
            self._open.begin(key, draft.place)
            try:
                yield draft
            except (TimeoutError, Unavailable):
                # What does not answer is not asked to remove anything: the next start does.
                raise
            except BaseException:
                if not draft.shown:
                    with contextlib.suppress(Exception):
                        self._remove(key, lambda place: place == draft.place)
                        self._open.end(key, draft.place)
                raise
            with storage_errors(self._url, outcome="unknown"):
                self._open.end(key, draft.place)
            if replace:
                with contextlib.suppress(OSError):  # The newest counts.
                    self._remove(key, lambda place: place != draft.place)

    def manifest(self, key: str) -> bytes | None:
        with self._errors():
            for _ in range(1 if key.startswith("named/") else _LOOKS):
                names = [MANIFEST] if key.startswith("named/") else self._manifests(key, self._found(key))
                if not names:
                    break
                # One that is gone: another has just taken its place, or will not.
                with contextlib.suppress(FileNotFoundError):
                    return self.call("cat_file", self.path(key, names[-1]))
            return None

    def keys(self, prefix: str) -> list[str]:
        with self._errors():
            found = self._found(prefix)
            return sorted(key for key in found if self._manifests(key, found))

    def fetch(self, key: str, names: Mapping[str, str]) -> Path:
        with self._errors():
            folder = self._cache / secrets.token_hex(8)
            folder.mkdir(mode=0o700, parents=True)
            try:
                for name, there in names.items():
                    with contextlib.suppress(FileNotFoundError):
                        self._fetch_file(self.path(key, there), folder / name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder

    def delete(self, key: str) -> None:
        with self._errors():
            self._fence()
            self._remove(key, lambda _: True)

    def sweep(self) -> None:
        with self._errors():
            found = self._found("")
            for key, names in found.items():
                if key.startswith("auto/"):
                    whole = {place_of(name) for name in self._manifests(key, found)}
                    if whole < {*map(place_of, names)}:
                        self._fence()
                        self._remove(key, lambda place, whole=whole: place not in whole)
            for key, place in self._open.all():
                # Perhaps its writer was killed when it was shown already.
                if key.startswith("auto/") or place.encode() not in (self.manifest(key) or b""):
                    self._fence()
                    self._remove(key, lambda each, place=place: each == place)
                self._open.end(key, place)
        shutil.rmtree(self._cache, ignore_errors=True)

    def show(self, key: str, place: str, manifest: bytes) -> None:
        """Put the manifest of a write whose files are there. AlreadyExists where another has the name."""
        self._fence()
        with storage_errors(self._url, outcome="unknown"):
            if key.startswith("auto/"):
                self.call("pipe_file", self.path(key, f"{place}{MANIFEST}"), manifest)
            else:
                self._put_first(key, manifest)

    def _put_first(self, key: str, manifest: bytes) -> None:
        path = self.path(key, MANIFEST)
        if not self._creates:
            # Two that put theirs at the same moment both have one that is whole, and the later one's stays.
            if self.call("exists", path):
                raise taken(key)
            self.call("pipe_file", path, manifest)
            return
        try:
            self.call("pipe_file", path, manifest, mode="create")
        except FileExistsError:
            # A library that tries again may find what it has put itself.
            if self.manifest(key) != manifest:
                raise taken(key) from None

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
        except (FileNotFoundError, FileExistsError, TimeoutError):
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
                if is_key(key) and key.startswith(prefix):
                    folders.setdefault(key, set()).add(name)
        return folders

    def _below_root(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root else path

    def _manifests(self, key: str, found: Mapping[str, set[str]]) -> list[str]:
        """The names of the manifests that count, oldest first."""
        names = found.get(key, set())
        if key.startswith("named/"):
            return [MANIFEST] if MANIFEST in names else []
        still_open = self._open.all()
        places = sorted(place_of(name) for name in names if name.removeprefix(place_of(name)) == MANIFEST)
        return [f"{place}{MANIFEST}" for place in places if (key, place) not in still_open]

    def _remove(self, key: str, chosen: Callable[[str], bool]) -> None:
        """Remove the files that are there now and whose place is `chosen`."""
        names = [name for name in self._found(key).get(key, set()) if chosen(place_of(name))]
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):
            with contextlib.suppress(FileNotFoundError):
                self.call("rm_file", self.path(key, name))

    def _fetch_file(self, path: str, target: Path) -> None:
        size = self.call("info", path)["size"]
        with open(target, "xb") as file:
            for start in range(0, size, _PIECE_BYTES):
                file.write(self.call("cat_file", path, start=start, end=min(start + _PIECE_BYTES, size)))

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(self._url)


def _file_system(url: str, options: Mapping[str, str]) -> tuple[Any, str]:
    """(fsspec's file system, the path of the root in it). ConfigError where fsspec does not know the URL's kind."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"checkpoint_url: {error}: {url}") from None
    return files, str(root).rstrip("/")
