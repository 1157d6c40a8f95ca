"""The segments that a journal has, and the blobs that they name: what is there, and what goes behind a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from gradwire_server.storage.blobs import Blobs
from gradwire_server.storage.durable_files import sync_folder
from gradwire_server.storage.segments import SegmentFile, bounded
from gradwire_server.storage.storage_errors import storage_error


class JournalFiles:
    """See the module. `remove` and `sweep` may block: one thread may call them while the event loop's calls the rest.

    segments: those that there are. unread: of these, whose records were not read: what they name is not known.
    """

    def __init__(
        self, folder: Path, blobs: Blobs, *, durable: bool, segments: Sequence[SegmentFile], unread: Collection[Path]
    ) -> None:
        self._folder = folder
        self._blobs = blobs
        self._durable = durable
        self._segments = list(segments)
        self._unread = frozenset(unread)
        self._swept = False
        self._change = threading.Lock()

    def all(self) -> list[SegmentFile]:
        """In order, each with what the later ones leave of it."""
        with self._change:
            return list(self._segments)

    def begin(self, path: Path, epoch: int, first: int) -> None:
        """A segment was begun behind the others, perhaps in place of an empty one."""
        with self._change:
            kept = [segment for segment in self._segments if segment.path != path]
            self._segments = bounded([*kept, SegmentFile(path, epoch, first)])

    def remove(self, needed: int) -> None:
        """Remove whole segments, and blobs, that hold nothing from command `needed` on.

        Whatever cuts this off, the rest is whole: segments go oldest first, their blobs afterwards. Errors of
        `storage_error`: what cannot be removed stays until another time.
        """
        segments = self.all()
        gone: list[SegmentFile] = []
        try:
            for segment, following in pairwise(segments):
                if following.first > needed:
                    break
                segment.path.unlink(missing_ok=True)
                gone.append(segment)
            if gone and self._durable:
                sync_folder(self._folder)
            rest = segments[len(gone) :]
            self._blobs.cut(rest[0].first if rest else needed)
            self._sweep(rest)
        except OSError as error:
            raise storage_error(error, "remove what a checkpoint holds") from error
        finally:
            self._forget(gone)

    def remove_empty(self, refused: Collection[int]) -> None:
        """Remove segments of which the later ones leave nothing, but for commands that were refused behind these."""
        gone = [each for each in self.all() if each.until is not None and each.until <= each.first]
        for segment in [each for each in gone if each.first - 1 not in refused]:
            segment.path.unlink(missing_ok=True)
            self._forget([segment])
        self._sweep(self.all())

    def _forget(self, gone: Sequence[SegmentFile]) -> None:
        paths = {segment.path for segment in gone}
        with self._change:
            self._segments = [segment for segment in self._segments if segment.path not in paths]

    def _sweep(self, segments: Sequence[SegmentFile]) -> None:
        """Remove, once, blobs of before that nothing names, when the records of all these segments are known."""
        if not self._swept and not any(segment.path in self._unread for segment in segments):
            self._blobs.sweep()
            self._swept = True
