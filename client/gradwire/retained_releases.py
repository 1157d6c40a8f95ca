"""Forwards whose graph the client has dropped are let go of on the service, without anybody waiting for it."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from gradwire.errors import GradwireError

_GATHER_SECONDS = 0.02
"""How long names are gathered for one call, so that the next forward may take them along instead."""


class RetainedReleases:
    """The names of dropped forwards. `send` lets go of some, in a call, from a thread that waits for them."""

    def __init__(self, send: Callable[[Sequence[str]], None]) -> None:
        self._names: deque[str] = deque()
        # Python may collect garbage, and so drop a name, wherever a lock is held: neither of these takes one.
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._send = send
        weakref.finalize(self, self._wake.put, False).atexit = False

    def watch(self) -> None:
        """Have the thread wait for names."""
        if self._thread is None:
            arguments = (self._names, self._wake, self._sending, self._send)
            self._thread = threading.Thread(target=_run, args=arguments, name="gradwire-release", daemon=True)
            self._thread.start()

    @property
    def drop(self) -> Callable[[str], None]:
        """What to call with the name of a forward that nobody can go back through any more. It does not wait."""
        names, wake = self._names, self._wake

        def drop(name: str) -> None:
            names.append(name)
            wake.put(True)

        return drop

    def take(self) -> list[str]:
        """The names that wait, for a forward to take along."""
        # What is being sent must get there first: the forward may need the room.
        with self._sending:
            return _drained(self._names)


def _run(
    names: deque[str], wake: queue.SimpleQueue[bool], sending: threading.Lock, send: Callable[[Sequence[str]], None]
) -> None:
    while wake.get():
        time.sleep(_GATHER_SECONDS)
        with sending:
            # Those that cannot be let go of expire.
            if found := _drained(names):
                with suppress(GradwireError):
                    send(found)


def _drained(names: deque[str]) -> list[str]:
    found: list[str] = []
    with suppress(IndexError):
        while True:
            found.append(names.popleft())
    return found
