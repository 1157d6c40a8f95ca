"""Fails if a process of a test run outlived it: `python tests/leftovers.py MARKER`.

A run's processes carry GRADWIRE_TEST_RUN=MARKER in their environment, whoever started them and wherever they hang in
the process tree. They get ten seconds to end on their own, which is what the service promises.
"""

from __future__ import annotations

import sys
import time

import psutil
from processes import ENDED

PATIENCE = 10.0


def processes_of(marker: str) -> list[psutil.Process]:
    """The living processes whose environment carries the marker."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRADWIRE_TEST_RUN") == marker and process.status() not in ENDED:
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> int:
    marker, deadline = sys.argv[1], time.monotonic() + PATIENCE
    while (left := processes_of(marker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        try:
            print(f"left behind: {process.pid} {' '.join(process.cmdline())[:150]}")
        except psutil.Error:
            continue
    print("no process is left behind" if not left else f"{len(left)} processes outlived the tests")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
