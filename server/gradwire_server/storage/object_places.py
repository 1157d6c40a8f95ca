"""How the files of one write of a checkpoint are told from another's in a store of objects, and which writes are open.

Every write has a place: what stands before the names of its files, and of no other's. So nothing that is there is
overwritten or taken for one's own, and a call that was given up and does its work later changes nothing else.
"""

from __future__ import annotations

import errno
import re
import secrets
import threading
import time
from collections.abc import Collection
from pathlib import Path

from gradwire_server.storage.durable_files import sync_folder

_PLACE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}\.")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def new_place() -> str:
    """One that nobody has; later ones sort behind it."""
    return f"{time.time_ns():016x}-{secrets.token_hex(4)}."


def place_of(name: str) -> str:
    """The place of a file by its name; "" of one that an older version wrote."""
    found = _PLACE.match(name)
    return found[0] if found else ""


class OpenWrites:
    """The writes that nobody was told have succeeded, in a folder, where they outlive the process. Any thread may call.

    One that was given up may still come to its end; it stays open, and what it shows then is not looked at.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._change = threading.Lock()
        self._open = set(_read(folder))

    def begin(self, key: str, place: str) -> None:
        """Note a write before anything of it is there. On a full disk it is known until the process ends."""
        with self._change:
            self._open.add((key, place))
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path(key, place).touch()
            sync_folder(self._folder)
        except OSError as error:
            # Then a checkpoint may be what makes room.
            if error.errno not in _NO_ROOM:
                raise

    def end(self, key: str, place: str) -> None:
        """It has succeeded, or nothing is left of it. Durable on return; OSError leaves it open."""
        path = self._path(key, place)
        if path.exists():
            path.unlink()
            sync_folder(self._folder)
        with self._change:
            self._open.discard((key, place))

    def all(self) -> Collection[tuple[str, str]]:
        """(key, place) of each."""
        with self._change:
            return frozenset(self._open)

    def _path(self, key: str, place: str) -> Path:
        return self._folder / f"{place}{key.replace('/', '@')}"


def _read(folder: Path) -> list[tuple[str, str]]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [(name.removeprefix(place).replace("@", "/"), place) for name in names if (place := place_of(name))]
