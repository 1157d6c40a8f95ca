"""The process that Ray's workers are forked from, started beside Ray: it imports torch while Ray starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from gradwire_server.processes.process_tree import ends_with_parent

_TEMPLATE = "gradwire_workers.pool.template"
_BACKLOG = 128


def start_template(path: Path, ray_process: int, environment: Mapping[str, str], log: IO[bytes]) -> None:
    """Start the one that listens on the socket `path`, for the Ray of that process: it ends when that does.

    Whoever connects waits until it has imported all. Should it fail, Ray's workers start another one. No worker of an
    earlier Ray may be left.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(_BACKLOG)
        subprocess.Popen(
            [sys.executable, "-P", "-m", _TEMPLATE, str(listener.fileno()), str(ray_process)],
            # Threads do not survive a fork. Those that a rank computes with start when it does.
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )
