"""Programs of tests as forks of a process that has imported torch, as ranks are: milliseconds in place of seconds."""

from __future__ import annotations

import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


class Fork:
    """A program that runs. `output`: what it prints."""

    def __init__(self, output: int) -> None:
        self.output = os.fdopen(output)
        self.pid = int(self.output.readline())
        self._handle = os.pidfd_open(self.pid)

    def kill(self) -> None:
        """Ends it, stopped or not. Nothing happens if it is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def ends(self, seconds: float) -> bool:
        """Whether it has ended, or does within so many seconds."""
        waiting = select.poll()
        waiting.register(self._handle, select.POLLIN)
        return bool(waiting.poll(1000 * seconds))

    def close(self) -> None:
        """Ends it, waits for that, and lets go of it."""
        self.kill()
        assert self.ends(10)
        self.output.close()
        os.close(self._handle)


class TorchForks:
    """Starts programs. The service's own template forks them; it ends with this process, or with `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp")
        self._template: subprocess.Popen[bytes] | None = None

    @property
    def _address(self) -> str:
        return f"{self._folder.name}/template.sock"

    def start(self, program: Path, *arguments: str) -> Fork:
        """`python program arguments`, but for the time that torch takes to be imported."""
        # Not at the top, for the forks run this file too, and need none of it.
        from gradwire_workers.pool.handover import Handover

        if self._template is None:
            self._start_template()
        state = {
            "arguments": [__file__, str(program), *arguments],
            "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
            "folder": os.getcwd(),
            "oom_score": Path("/proc/self/oom_score_adj").read_text(),
        }
        output, theirs = os.pipe()
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
            connection.settimeout(60)
            connection.connect(self._address)
            taken = Handover(state, [nothing.fileno(), theirs, 2]).send(connection)
        os.close(theirs)
        assert taken
        return Fork(output)

    def _start_template(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen()
            file = str(listener.fileno())
            self._template = subprocess.Popen(
                [sys.executable, "-P", "-m", "gradwire_workers.pool.template", file, str(os.getpid())],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends the template. What it has forked goes on."""
        if self._template is not None:
            self._template.kill()
            self._template.wait()
        self._folder.cleanup()


if __name__ == "__main__":
    print(os.getpid(), flush=True)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
