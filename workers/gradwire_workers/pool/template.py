"""A process with torch imported, whose forks are Ray's workers: `python -m gradwire_workers.pool.template FD PID`.

FD: the Unix socket that listens for handovers. PID: Ray's process on this node, whose end is the template's too.

One thread, no Ray, no CUDA: a fork has only the thread that forked, Ray's library keeps what it read from the
environment when it was loaded, and a process that has used a GPU cannot lend it to its forks.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import runpy
import select
import signal
import socket
import sys

from gradwire_workers.pool.handover import Handover
from gradwire_workers.pool.warm_up import LAZY_MODULES

logger = logging.getLogger(__name__)

_STALLED_SECONDS = 2.0
_OF_RANKS = ("gradwire_workers.rank_commands", "gradwire_workers.rank_server", *LAZY_MODULES)
# What Ray imports beside itself.
_OF_RAY = ("click", "filelock", "google.protobuf", "jsonschema", "packaging.version", "psutil", "requests", "yaml")


def main(listener: socket.socket, ray_process: int) -> None:
    """Fork one worker for each handover, until Ray's process ends."""
    try:
        ray_ends = os.pidfd_open(ray_process)
    except ProcessLookupError:
        return
    for module in (*_OF_RANKS, *_OF_RAY):
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads, and keep their locks"
    gc.collect()
    # A collection in a fork would write to every page, and so copy it.
    gc.freeze()
    # Whoever forks a worker need not wait for its end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    handover = _serve(listener, ray_ends)
    if handover is not None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        runpy.run_path(handover.become(), run_name="__main__")


def _serve(listener: socket.socket, ray_ends: int) -> Handover | None:
    """Returns in each fork, with what it is to become; in the template only when Ray has ended."""
    waiting = select.poll()
    waiting.register(ray_ends, select.POLLIN)
    waiting.register(listener, select.POLLIN)
    # Whoever connected may be gone by the time of accept.
    listener.setblocking(False)
    while ray_ends not in dict(waiting.poll()):
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_STALLED_SECONDS)
                handover = Handover.receive(connection)
                try:
                    forked = os.fork() == 0
                except OSError:
                    handover.close()
                    raise
                if forked:
                    _acknowledge(handover, connection)
                    os.close(ray_ends)
                    listener.close()
                    return handover
                handover.close()
        except (OSError, ValueError) as error:
            # Whoever asked sees the connection end, and helps itself.
            logger.warning("a handover failed: %s", error)
    return None


def _acknowledge(handover: Handover, connection: socket.socket) -> None:
    try:
        handover.acknowledge(connection)
    except OSError:
        # Whoever asked has given up, and runs the worker itself. A fork must never go on as a second template.
        os._exit(1)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
