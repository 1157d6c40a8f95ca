"""What the tests of storage share: a folder with its lock, entries, and journals that are closed with their test."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.storage_lock import StorageLock


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def lock(storage: Path) -> Iterator[StorageLock]:
    lock = StorageLock.take(storage, 0.0)
    yield lock
    lock.release()


@pytest.fixture
def model(storage: Path) -> Path:
    """The folder of a model."""
    return storage / "models" / "m"


@pytest.fixture
def open_journal(lock: StorageLock, model: Path) -> Iterator[Callable[..., tuple[Journal, list[Entry]]]]:
    """Opens the model's journal, as the frontend that holds the lock does, and lists the entries behind `after`."""
    journals: list[Journal] = []

    def opened(
        after: int = 0, *, lock: StorageLock = lock, durability: str = "process", folder: Path = model
    ) -> tuple[Journal, list[Entry]]:
        journal, entries = Journal.open(folder, lock, durability=durability, after=after)
        journals.append(journal)
        return journal, list(entries)

    yield opened
    for journal in journals:
        journal.close()


@pytest.fixture
def entry() -> Callable[..., Entry]:
    """Makes the entry of a number, the same each time; `nbytes` is its request's size."""

    def made(number: int, nbytes: int = 40, **changes: Any) -> Entry:
        source = random.Random(number)
        fields = {
            "number": number,
            "method": "TrainStep",
            "request": source.randbytes(nbytes),
            "reply": source.randbytes(8),
            "request_id": f"{number:032x}",
            "body": source.randbytes(4),
        }
        return Entry(**{**fields, **changes})

    return made


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system in a new folder, with the arguments of mount(8); skips where that is not allowed."""
    mounted: list[Path] = []

    def mounted_at(*arguments: str) -> Path:
        folder = tmp_path / f"mount-{len(mounted)}"
        folder.mkdir()
        answer = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
        if answer.returncode:
            pytest.skip(f"mounting is not allowed here: {answer.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mounted_at
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
