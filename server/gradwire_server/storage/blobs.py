"""The uploads that a journal's records name, kept as files beside it for as long as one of them does."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gradwire_server.storage.durable_files import link_or_copy, sync_file, sync_folder
from gradwire_server.storage.storage_errors import storage_error

_UPLOAD = re.compile(r"uploads/([A-Za-z0-9_-]{1,64})")


class Blobs:
    """One model's. A blob stays while a command that may still be recorded waits for it, or a record names it."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._durable = durable
        self._keeping = threading.Lock()  # Held while bytes are copied.
        self._change = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._named_by: dict[str, int] = {}

    def path(self, file: str) -> Path:
        """Where the blob of that name lies."""
        return self._folder / file

    def keep(self, source: Path, name: str) -> str:
        """Keep the upload "uploads/{upload}", whose bytes are in `source`; the name of its file here.

        It is linked where that can be, else copied by the kernel; durable on return where the journal is. An upload of
        that name with other bytes, which a record still names, keeps its file. Errors of `storage_error`. May block
        long: a thread may call it.
        """
        if not (upload := _UPLOAD.fullmatch(name)):
            raise ValueError(f"{name!r} is no name of an upload")
        file = upload[1]
        with self._keeping:
            with self._change:
                there = self.path(file).exists()
                if there and not self.path(file).samefile(source):
                    file = f"{file}-{secrets.token_hex(8)}"
                    there = False
                self._waiting[file] += 1
            if there:
                return file
            try:
                self._bring(source, self.path(file))
            except OSError as error:
                with self._change:
                    self._end_wait(file)
                raise storage_error(error, "hold the command's upload") from error
        return file

    def note(self, files: Iterable[str], number: int) -> None:
        """The record of command `number` names these."""
        with self._change:
            for file in files:
                self._end_wait(file)
                self._named_by[file] = number

    def drop(self, file: str) -> None:
        """The command that `keep` was called for leaves no record."""
        with self._change:
            self._end_wait(file)
            if file not in self._waiting and file not in self._named_by:
                self.path(file).unlink(missing_ok=True)

    def give_up_waiting(self) -> None:
        """No command that `keep` was called for will be recorded any more: the next `cut` removes what none names."""
        with self._change:
            for file in self._waiting:
                self._named_by.setdefault(file, 0)  # Before the first command.
            self._waiting.clear()

    def cut(self, first: int) -> None:
        """Remove the blobs that only records before command `first` named, which are gone. May block."""
        with self._change:
            files = [file for file, number in self._named_by.items() if number < first]
            taken = [self._take_away(self.path(file)) for file in files if file not in self._waiting]
            for file in files:
                del self._named_by[file]
        _remove(taken)

    def sweep(self) -> None:
        """Remove what no record names: left by commands that were cut off. All records were noted before. May block."""
        with self._change:
            # The name without a dot is of one that is just being brought.
            kept = self._named_by.keys() | self._waiting.keys()
            taken = [
                self._take_away(each) for each in self._folder.iterdir() if each.name.removeprefix(".") not in kept
            ]
        _remove(taken)

    def _take_away(self, path: Path) -> Path:
        """Under a name that nobody asks for: to remove what is large takes long, and others wait for the lock."""
        taken = path.with_name(f".{secrets.token_hex(16)}")
        with suppress(FileNotFoundError):
            os.rename(path, taken)
        return taken

    def _end_wait(self, file: str) -> None:
        self._waiting[file] -= 1
        if self._waiting[file] <= 0:
            del self._waiting[file]

    def _bring(self, source: Path, target: Path) -> None:
        """Under another name first: what has its own name is whole."""
        temporary = target.with_name(f".{target.name}")
        try:
            temporary.unlink(missing_ok=True)
            link_or_copy(source, temporary)
            if self._durable:
                sync_file(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        if self._durable:
            sync_folder(self._folder)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
