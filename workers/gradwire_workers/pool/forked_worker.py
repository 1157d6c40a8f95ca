"""What Ray starts in place of its own worker: it has the node's template fork one, and is gone.

Ray's worker imports torch in seconds; the fork of a process that has it costs milliseconds and shares its memory.
To Ray the fork is the worker: it registers with its own process id, and dies as any other. A template that is not
there is started; where none can be had, or it does not answer, this process becomes the worker itself: slower, and
nothing else.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import socket
import sys
import time

from gradwire_workers.pool.handover import TEMPLATE_VARIABLE, Handover

_TRIES = 2
# A new template imports torch first. Ray waits for a worker for 60 s: this leaves time for the slow way.
_PATIENCE_SECONDS = 25.0
_BACKLOG = 128


def main(program: str, arguments: list[str]) -> None:
    """Have `program` run in a fork of the template, or else in this process."""
    if not _hand_over(program, arguments):
        import runpy

        sys.argv = [program, *arguments]
        sys.path[0] = os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")


def _hand_over(program: str, arguments: list[str]) -> bool:
    handover = Handover.of_this_process(program, arguments)
    path = os.environ[TEMPLATE_VARIABLE]
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for _ in range(_TRIES):
        try:
            with _connect(path, deadline) as connection:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                if handover.send(connection):
                    return True
            print(f"the template at {path} ended", file=sys.stderr)
        except TimeoutError:
            print(f"the template at {path} did not answer within {_PATIENCE_SECONDS:g} s", file=sys.stderr)
            _forget(path)
            return False
        except OSError as error:
            print(f"the template at {path}: {error}", file=sys.stderr)
    return False


def _connect(path: str, deadline: float) -> socket.socket:
    """A connection to the template, started if there is none."""
    try:
        return _connect_to_running(path, deadline)
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Somebody else may have been faster.
        try:
            return _connect_to_running(path, deadline)
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            os.unlink(path)
        # This socket takes connections at once; the template accepts them when it can.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(_BACKLOG)
            _start_template(listener)
        return _connect_to_running(path, deadline)


def _connect_to_running(path: str, deadline: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(path)
    except BlockingIOError as error:  # so many wait already
        connection.close()
        raise TimeoutError from error
    except BaseException:
        connection.close()
        raise
    return connection


def _start_template(listener: socket.socket) -> None:
    import subprocess

    subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "gradwire_workers.pool.template"),
            *(str(listener.fileno()), str(os.getppid())),
        ],
        # Threads do not survive a fork. Those that a rank computes with start when it does.
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )


def _forget(path: str) -> None:
    """Let the next worker start another template. What the silent one forks later ends by itself."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def ray_worker() -> str:
    """The program that Ray would have started. Found without importing Ray, which takes a third of a second."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    return os.path.join(spec.submodule_search_locations[0], "_private", "workers", "default_worker.py")


if __name__ == "__main__":
    main(ray_worker(), sys.argv[1:])
