"""Files of downloads that clients have mapped: how much memory they keep, and when it is given back."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.lent_files import is_unused, lend

MOST_FILES = 256
"""Files that are lent at once. A client that keeps more results than that gets further ones by gRPC."""

IDLE_SECONDS = 2.0
"""How long a file that nobody has any more waits for whoever made it to write to it again."""


class LentFiles:
    """What is lent, and what waits to be written to again, of at most `bound` bytes together."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._sizes: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(self._sizes.values())

    def check_room(self, nbytes: int, files: int) -> None:
        """Raise ResourceExhausted LENT_BYTES_EXHAUSTED where clients keep too much to lend them more."""
        if self._fits(nbytes, files):
            return
        self._sweep(idle=0.0)
        if not self._fits(nbytes, files):
            raise ResourceExhausted(
                f"clients keep {self.nbytes} bytes in {len(self._sizes)} files of results",
                reason="LENT_BYTES_EXHAUSTED",
            )

    def lend(self, path: str) -> bool:
        """Take over a file that a client has got open, or that nobody needs any more. False: it cannot be."""
        try:
            size = os.stat(path).st_size
            if not self._fits(size, 1):
                return False
            lent = lend(path)
        except OSError:
            return False
        self._sizes[lent], self._since[lent] = size, time.monotonic()
        if self._timer is None:
            self._wait()
        return True

    def close(self) -> None:
        """Remove all. What clients have mapped stays theirs."""
        if self._timer is not None:
            self._timer.cancel()
        for path in list(self._sizes):
            self._remove(path)

    def _fits(self, nbytes: int, files: int) -> bool:
        return self.nbytes + nbytes <= self._bound and len(self._sizes) + files <= MOST_FILES

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        self._sweep(idle=IDLE_SECONDS)
        if self._sizes:
            self._wait()

    def _sweep(self, idle: float) -> None:
        """Remove files that nobody has, and nobody has had for `idle` seconds. Forget those that were taken back."""
        now = time.monotonic()
        for path in list(self._sizes):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except OSError:
                self._forget(path)
                continue
            is_free = is_unused(descriptor)
            os.close(descriptor)
            if not is_free:
                self._since[path] = now
            elif now - self._since[path] >= idle:
                self._remove(path)

    def _remove(self, path: str) -> None:
        with suppress(OSError):
            os.unlink(path)
        self._forget(path)

    def _forget(self, path: str) -> None:
        del self._sizes[path], self._since[path]
