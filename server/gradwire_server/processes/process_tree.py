"""Processes that end together: who belongs to a service, and how all of it is killed. Linux only.

A process belongs when it carries the service's marker in its environment, which children inherit and Ray hands to its
workers, or when it descends from a process that does. The marker finds daemons that left the tree; the tree finds
processes that dropped the environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

MARKER = "GRADWIRE_SERVICE"
"""The environment variable whose value is the service's id."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """From now on orphaned descendants of this process become its children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(number: int) -> None:
    """Have the kernel send this process the signal `number` when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def ends_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` for children that a single-threaded parent starts: no window between start and promise."""
    parent = os.getpid()

    def promise() -> None:
        end_with_parent(number)
        if os.getppid() != parent:
            os._exit(1)

    return promise


def members(service: str) -> set[int]:
    """The processes of a service, this process and its ancestors left out."""
    parents = _parents()
    found = {pid for pid in parents if _is_marked(pid, service)}
    roots = found | {os.getpid()}
    while True:
        children = {pid for pid, parent in parents.items() if parent in roots} - roots
        if not children:
            return roots - _line_of(os.getpid(), parents)
        roots |= children


def named_children(parent: int, names: Collection[str]) -> set[int]:
    """The children of a process that the kernel knows by one of these names, of 15 bytes at most."""
    return {pid for pid, its_parent in _parents().items() if its_parent == parent and _name(pid) in names}


def kill_members(service: str, *, timeout: float = 8.0) -> set[int]:
    """SIGKILL the service's processes until none is left; those that outlive `timeout` seconds are returned."""
    deadline = time.monotonic() + timeout
    while True:
        # Again and again: a process may fork between the look and the kill.
        left = members(service)
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            _kill(pid)
        time.sleep(0.02)
        reap_children()


def reap_children() -> dict[int, int]:
    """Collect the children that have ended: pid -> exit code, negative for a signal."""
    ended = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _line_of(pid: int, parents: dict[int, int]) -> set[int]:
    line = set()
    while pid and pid not in line:
        line.add(pid)
        pid = parents.get(pid, 0)
    return line


def _parents() -> dict[int, int]:
    """Every process that runs: pid -> parent's pid. Zombies are left out: there is nothing to kill."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text(errors="replace")
            except OSError:
                continue
            # The name, in parentheses, may hold anything, parentheses included.
            state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    return parents


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _is_marked(pid: int, service: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARKER}={service}".encode() in environment.split(b"\0")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
