"""The outermost process of a service: when anything ends it, nothing of it is left.

It forks the supervisor, passes signals on to it, and waits for it or for the owner to end, however they end. Then it
kills every process of the service and removes its folders. It does nothing else, and waits for nothing but the kernel.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from gradwire_server.processes.process_tree import adopt_orphans, end_with_parent, kill_members, reap_children
from gradwire_server.processes.service_folders import ServiceFolders

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def guard(service: str, storage: Path | None, owner: int | None, supervise: Callable[[ServiceFolders], int]) -> int:
    """Run `supervise(folders)` in a child and return its exit code, after everything of the service is gone.

    storage: where its logs stay; None: nowhere.
    owner: the process, this one's parent, whose end ends the service at once; None: the service stands alone. A first
    SIGTERM, SIGINT or SIGHUP becomes the supervisor's SIGTERM; a second one kills.
    """
    adopt_orphans()
    owner_ends = _descriptor_of_parent(owner)
    folders = ServiceFolders.create(service, storage)
    try:
        supervisor = _fork(service, folders, supervise)
        return _wait(supervisor, owner_ends)
    finally:
        clean_up(service, folders)


def clean_up(service: str, folders: ServiceFolders) -> None:
    """Kill what is left of the service and remove its folders."""
    stuck = kill_members(service)
    folders.remove()
    if stuck:
        print(f"gradwire: processes that cannot be killed: {sorted(stuck)}", file=sys.stderr)


def _fork(service: str, folders: ServiceFolders, supervise: Callable[[ServiceFolders], int]) -> int:
    guard_pid = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # Its own group: Ctrl-C in a terminal reaches the guard alone, so that the parts end in order.
        os.setpgid(0, 0)
        end_with_parent(signal.SIGTERM)
        code = supervise(folders)
        if os.getppid() != guard_pid:
            clean_up(service, folders)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(supervisor: int, owner_ends: int | None) -> int:
    """Wait until the supervisor or the owner ends; the exit code is the supervisor's."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    for number in (*_STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    waiting = select.poll()
    waiting.register(wake_read, select.POLLIN)
    if owner_ends is not None:
        waiting.register(owner_ends, select.POLLIN)
    stops = 0
    while True:
        # First of all: the supervisor may have ended before SIGCHLD had its handler.
        ended = reap_children()
        if supervisor in ended:
            return ended[supervisor] if ended[supervisor] >= 0 else 1
        events = [descriptor for descriptor, _ in waiting.poll()]
        if owner_ends in events:
            return 1
        if wake_read in events and any(number in _STOP_SIGNALS for number in os.read(wake_read, 512)):
            stops += 1
            os.kill(supervisor, signal.SIGTERM if stops == 1 else signal.SIGKILL)


def _descriptor_of_parent(owner: int | None) -> int | None:
    """A descriptor that becomes readable when the owner ends.

    The owner is a process, not the thread that started this one: that may end at once.
    """
    if owner is None:
        return None
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        raise SystemExit(1) from None
    if os.getppid() != owner:  # It ended meanwhile, and the number may have gone to another process.
        raise SystemExit(1)
    return descriptor
