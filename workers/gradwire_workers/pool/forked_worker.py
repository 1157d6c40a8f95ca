"""What Ray starts in place of its own worker: it has the node's template fork one, and is gone.

Ray's worker imports torch in seconds; the fork of a process that has it costs milliseconds and shares its memory.
To Ray the fork is the worker: it registers with its own process id, and dies as any other. A template that is not
there is started; where none can be had, this process becomes the worker itself, at the old price.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import runpy
import socket
import subprocess
import sys

from gradwire_workers.pool.handover import TEMPLATE_VARIABLE, Handover

_TRIES = 3
# A new template imports torch first; Ray waits for a worker for 60 s.
_PATIENCE_SECONDS = 50.0
_BACKLOG = 128


def main(program: str, arguments: list[str]) -> None:
    """Have `program` run in a fork of the template, or else in this process."""
    if not _hand_over(program, arguments):
        sys.argv = [program, *arguments]
        sys.path[0] = os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")


def _hand_over(program: str, arguments: list[str]) -> bool:
    handover = Handover.of_this_process(program, arguments)
    path = os.environ[TEMPLATE_VARIABLE]
    for _ in range(_TRIES):
        try:
            with _connect(path) as connection:
                connection.settimeout(_PATIENCE_SECONDS)
                if handover.send(connection):
                    return True
        except TimeoutError as error:
            # It may still fork one, so nobody else must do the same.
            sys.exit(f"the template at {path} did not answer within {_PATIENCE_SECONDS:g} s: {error}")
        except OSError as error:
            print(f"the template at {path}: {error}", file=sys.stderr)
    return False


def _connect(path: str) -> socket.socket:
    """A connection to the template, started if there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        return connection
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX)
        try:
            # Somebody else may have been faster.
            connection.connect(path)
            return connection
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            os.unlink(path)
        # A socket of this thread's own making takes connections at once; the template accepts them when it can.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(_BACKLOG)
            _start_template(listener)
        connection.connect(path)
        return connection


def _start_template(listener: socket.socket) -> None:
    subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "gradwire_workers.pool.template"),
            *(str(listener.fileno()), str(os.getppid())),
        ],
        # Threads do not survive a fork, so the template must have none.
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )


def ray_worker() -> str:
    """The program that Ray would have started. Found without importing Ray, which takes a third of a second."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    return os.path.join(spec.submodule_search_locations[0], "_private", "workers", "default_worker.py")


if __name__ == "__main__":
    main(ray_worker(), sys.argv[1:])
