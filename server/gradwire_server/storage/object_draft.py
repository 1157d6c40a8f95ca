"""A checkpoint that is being written to a store of objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gradwire_proto.errors import AlreadyExists

if TYPE_CHECKING:
    from gradwire_server.storage.object_folders import ObjectFolders


class ObjectDraft:
    """A folder without a manifest. `place`: what stands before the names of its files."""

    def __init__(self, folders: ObjectFolders, key: str, place: str) -> None:
        self.place = place
        self._folders = folders
        self._key = key
        self._sizes: dict[str, int] = {}
        self.shown = False
        """Whether the manifest was, perhaps, put."""

    @contextmanager
    def file(self, name: str) -> Iterator[_ObjectFile]:
        path = self._path(name)
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
            size = self._folders.call("info", self._path(name))["size"]
            if size != nbytes:
                raise OSError(f"{name} has {size} bytes after {nbytes} were written")
        self.shown = True
        try:
            self._folders.show(self._key, self.place, manifest)
        except AlreadyExists:
            self.shown = False
            raise

    def _path(self, name: str) -> str:
        return self._folders.path(self._key, f"{self.place}{name}")


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
