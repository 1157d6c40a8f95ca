"""What the tests ask about processes that the service started."""

from __future__ import annotations

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
