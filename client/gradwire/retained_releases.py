"""Forwards whose graph the client has dropped are let go of on the service, without anybody waiting for it."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from gradwire.errors import GradwireError

_GATHER_SECONDS = 0.02
"""How long names are gathered for one call, so that the next forward may take them along instead."""


class RetainedReleases:
    """The names of dropped forwards. `send` lets go of some, in a call.

    `drop` may be called wherever Python collects garbage: it takes no lock that could be held.
    """

    def __init__(self, send: Callable[[Sequence[str]], None]) -> None:
        self._names: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._send = send
        weakref.finalize(self, self._names.put, None)

    def watch(self) -> None:
        """Have a thread wait for names."""
        if self._thread is None:
            arguments = (self._names, self._sending, self._send)
            self._thread = threading.Thread(target=_run, args=arguments, name="gradwire-release", daemon=True)
            self._thread.start()

    @property
    def drop(self) -> Callable[[str], None]:
        """What to call with the name of a forward that nobody can go back through any more."""
        return self._names.put

    def take(self) -> list[str]:
        """The names that wait, for a forward to take along."""
        # What is being sent must get there first: the forward may need the room.
        with self._sending:
            return _waiting(self._names)[0]


def _run(
    names: queue.SimpleQueue[str | None], sending: threading.Lock, send: Callable[[Sequence[str]], None]
) -> None:
    while (first := names.get()) is not None:
        time.sleep(_GATHER_SECONDS)
        with sending:
            more, ended = _waiting(names)
            # Those that are not let go of expire.
            with suppress(GradwireError):
                send([first, *more])
        if ended:
            return


def _waiting(names: queue.SimpleQueue[str | None]) -> tuple[list[str], bool]:
    """(the names in the queue, whether it has ended)."""
    found: list[str] = []
    with suppress(queue.Empty):
        while True:
            name = names.get_nowait()
            if name is None:
                return found, True
            found.append(name)
    return found, False
