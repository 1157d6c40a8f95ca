"""Stores of checkpoints: in a folder and in a store of objects."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.storage.stored_checkpoints import Storage


@pytest.fixture(params=["folder", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    url = str(tmp_path / "checkpoints") if request.param == "folder" else f"memory://{secrets.token_hex(8)}"
    made = Storage(url, tmp_path)
    yield made
    if request.param == "objects":
        with contextlib.suppress(FileNotFoundError):
            made.files.rm(made.root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints"), tmp_path)


@pytest.fixture
def segments(tmp_path: Path) -> Path:
    folder = tmp_path / "segments"
    folder.mkdir()
    return folder
