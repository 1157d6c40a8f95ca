"""Tensors that travel apart from the requests that use them: uploads before, downloads after."""

from __future__ import annotations

from pathlib import Path

from gradwire_proto.values import Limits
from gradwire_server.tensors.downloads import Downloads
from gradwire_server.tensors.held_bytes import HeldBytes
from gradwire_server.tensors.held_files import DOWNLOAD_PREFIX, UPLOAD_PREFIX, remove_files
from gradwire_server.tensors.uploads import Uploads


class TensorStore:
    """Uploads and downloads, in files of `folder`, which must be private and in shared memory.

    `limits.held_bytes` bounds what all of them hold together, `limits.held_seconds` how long each waits unused.

    held: what all owners hold, where this is one's store.
    """

    def __init__(self, folder: Path, limits: Limits, held: HeldBytes | None = None) -> None:
        # What a frontend that was killed left behind has no owner any more.
        for prefix in (UPLOAD_PREFIX, DOWNLOAD_PREFIX):
            remove_files(str(path) for path in folder.glob(f"{prefix}*"))
        self.held = HeldBytes(limits.held_bytes, "owner_held_bytes" if held is not None else "held_bytes", held)
        self.uploads = Uploads(folder, limits, self.held)
        self.downloads = Downloads(folder, limits, self.held)

    def close(self) -> None:
        """Remove everything that is held."""
        self.uploads.close()
        self.downloads.close()
