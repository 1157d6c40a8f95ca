"""A store of checkpoints, and a hand in what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from server.storage.checkpoint_cases import OWNER

from gradwire_proto.errors import (
    GradwireError,
)
from gradwire_server.storage.checkpoint_folders import place
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.manifest import FILES, MANIFEST

NAMED = "named/best"


class Storage:
    """A store, and a hand in what it keeps. `url`: of its root."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.files, self.root = fsspec.core.url_to_fs(url)
        self.store = self.opened()

    def opened(self, **options: Any) -> CheckpointStore:
        return CheckpointStore(self.url, self.folder / "cache", **{"owner": OWNER, **options})

    def path(self, key: str, name: str) -> str:
        """The file of that name, whatever stands before it where it is there."""
        folder = f"{self.root}/{place(key, OWNER)}"
        there = self.files.find(folder) if self.files.exists(folder) else []
        return next((path for path in there if path.endswith(f".{name}")), f"{folder}/{name}")

    def leftovers(self) -> list[str]:
        """The files that belong to no checkpoint that is shown."""
        own = [self.path(each, name) for each in self.store._folders.keys("") for name in (MANIFEST, *FILES)]
        cached = [str(path) for path in (self.folder / "cache").rglob("*") if path.is_file()]
        return sorted({*self.files.find(self.root)} - {*own}) + cached


def refusal(call: Callable[[], Any]) -> GradwireError:
    with pytest.raises(GradwireError) as refused:
        call()
    return refused.value
