"""The floor of a load test: the bare server of `echo_server.py`, started and ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gradwire.errors import Unavailable


@contextmanager
def echo_server(reply: bytes) -> Iterator[str]:
    """The target of a bare server that answers everything with `reply`; it ends with the block."""
    command = [sys.executable, "-m", "gradwire.load_test.echo_server"]
    # A group of its own: Ctrl-C is this process's to handle.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(len(reply).to_bytes(8, "little") + reply)
            process.stdin.flush()
            port = process.stdout.readline().decode().strip()
            if not port:
                raise Unavailable("the echo server ended before it listened", reason="ECHO_FAILED", retryable=False)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
