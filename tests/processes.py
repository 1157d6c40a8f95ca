"""What the tests ask about processes that the service started."""

from __future__ import annotations

import os
import signal
import time

import psutil

#: Of a process that has ended: its parent has not yet looked after it, or is doing so now.
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def alive(process: psutil.Process | int) -> bool:
    """Whether the process (or the one of that id) still runs."""
    try:
        known = psutil.Process(process) if isinstance(process, int) else process
        return known.is_running() and known.status() not in ENDED
    except psutil.NoSuchProcess:
        return False


def stop(process_id: int) -> None:
    """Stop a process by SIGSTOP, and return when it stands still: the signal reaches its threads a moment later."""
    os.kill(process_id, signal.SIGSTOP)
    stopped = time.monotonic() + 5
    while any(psutil.Process(each).status() != psutil.STATUS_STOPPED for each in _threads(process_id)):
        assert time.monotonic() < stopped, f"process {process_id} does not stop"
        time.sleep(0.002)


def _threads(process_id: int) -> list[int]:
    return [thread.id for thread in psutil.Process(process_id).threads()]
