"""Whether a file was replaced since it was read."""

from __future__ import annotations

import os
from pathlib import Path


def mark_of(path: Path) -> tuple[int, int, int] | None:
    """What differs once the file was replaced, also behind a symbolic link; None where it cannot be found."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
