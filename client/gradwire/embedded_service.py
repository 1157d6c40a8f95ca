"""`gradwire.launch()`: a service of one's own, a supervisor as a child process, gone when this process is."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwire.arguments import as_bool, as_int, wrong_type
from gradwire.connection_settings import check_timeout
from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from gradwire.client import Client

_LISTENING = re.compile(rb"gradwire listening on (\S+)")
_WRONG_SETTINGS = 2  # the supervisor's exit code


def launch(
    workers: int = 2,
    storage: str | os.PathLike[str] | None = None,
    *,
    timeout: float = 60.0,
    start_timeout: float = 60.0,
    shared_memory: bool = True,
    **server_options: Any,
) -> Client:
    """A client of an embedded service: a local Ray and a frontend on a free loopback port.

    The service ends with the client (`close()` or the end of its `with` block) or with this process, even by SIGKILL;
    its processes and temporary files are gone within seconds.

    workers: how many ranks the service can host, all models together. storage: a folder that keeps models, checkpoints
    and log files, for a later service too; None: they go with this one. timeout: seconds that each call takes at most,
    as in `connect`. start_timeout: seconds until the service must be ready. shared_memory: whether tensors
    travel through memory that both sides share. server_options: settings of the server by
    name, such as `spare_ranks=4` or `log_level="debug"`; see `gradwire serve --all-settings`.

    Raises FailedPrecondition (SERVER_NOT_INSTALLED) without the extra `gradwire[server]`; InvalidArgument for a wrong
    argument, before anything starts, and for wrong options; and Unavailable (LAUNCH_FAILED) with the end of the
    service's log when it does not come up.
    """
    check_timeout(timeout)
    check_timeout(start_timeout, "start_timeout")
    as_int(workers, "workers")
    if storage is not None and not isinstance(storage, (str, os.PathLike)):
        raise wrong_type(storage, "storage", "the path of a folder")
    if not as_bool(shared_memory, "shared_memory"):
        server_options["shared_memory"] = False
    service = EmbeddedService(workers, storage, server_options)
    try:
        # While the service starts: this imports torch and grpc, which takes seconds.
        from gradwire.client import connect

        client = connect(service.wait(start_timeout), timeout=timeout, shared_memory=shared_memory)
    except BaseException:
        service.stop()
        raise
    client.on_close(service.stop)
    return client


class EmbeddedService:
    """A local Ray and a frontend on a free loopback port, which end with this process, however it ends.

    workers: how many ranks the service can host. storage: a folder that keeps models, checkpoints and logs; None: they
    live as long as the service.
    options: settings of the server by name, such as `spare_ranks=1` or `log_level="debug"`.

    The constructor returns as soon as the process runs; FailedPrecondition (SERVER_NOT_INSTALLED) where the server
    extra is missing. `wait` says where it listens.
    """

    def __init__(self, workers: int, storage: str | os.PathLike[str] | None, options: dict[str, Any]) -> None:
        require_server()
        settings = {"listen": "127.0.0.1:0", "log_level": "warning", "workers": workers, **options}
        if storage is not None:
            settings["storage"] = Path(storage).absolute()
        # A file without a name: it takes what the service says as long as anybody may ask, and leaves nothing.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the service
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gradwire_server.supervisor", f"--owner-pid={self._owner}"),
                *(_flag(name, value) for name, value in settings.items() if value is not None),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Ctrl-C is this program's to handle: a service that ended by it could not finish the step in flight.
            start_new_session=True,
        )

    def wait(self, timeout: float) -> str:
        """The service's target, once it takes calls. On an error nothing of the service is left.

        Raises InvalidArgument for wrong options, Unavailable (LAUNCH_FAILED) with the end of the service's log when
        it ends early or takes longer than `timeout` seconds.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._end_at_once()

        assert self.process.stdout is not None
        watch = threading.Timer(timeout, give_up)
        watch.daemon = True
        watch.start()
        try:
            # Ends with the process, or with the timer that kills it.
            for line in self.process.stdout:
                if match := _LISTENING.match(line):
                    return match[1].decode()
            raise self._failure(timeout if late.is_set() else None)
        except BaseException:
            self.stop()
            raise
        finally:
            watch.cancel()

    def stop(self) -> None:
        """Drain and end the service; returns when its processes and files are gone. Safe to call again.

        Does nothing in a forked child: the service belongs to the process that started it.
        """
        if os.getpid() != self._owner:
            return
        with self._lock:
            if self.process.stdout is None or self.process.stdout.closed:
                return
            self.process.terminate()
            try:
                # Not for ever: the supervisor bounds its own end.
                self.process.wait()
            except KeyboardInterrupt:
                self._end_at_once()
                self.process.wait()
                raise
            finally:
                self.process.stdout.close()
                self._log.close()

    def log_tail(self, length: int = 4000) -> str:
        """The last `length` bytes that the service has written to its log; until `stop`."""
        # pread, because the offset is shared with the service's processes.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), length, max(0, size - length)).decode(errors="replace").strip()

    def _end_at_once(self) -> None:
        # Two signals end a service without draining. Two different ones, for the kernel may merge equal ones.
        self.process.terminate()
        self.process.send_signal(signal.SIGINT)

    def _failure(self, timed_out_after: float | None) -> GradwireError:
        code = self.process.wait()
        if timed_out_after is not None:
            what = f"The embedded service was not ready within {timed_out_after:g} s"
        elif code == _WRONG_SETTINGS:
            return InvalidArgument(self.log_tail(), reason="SERVER_OPTION_INVALID", field="server_options")
        else:
            what = f"The embedded service ended with exit code {code} before it was ready"
        return Unavailable(
            f"{what}. The end of its log:\n{self.log_tail() or '(empty)'}", reason="LAUNCH_FAILED", retryable=False
        )


def require_server() -> None:
    """Raise FailedPrecondition (SERVER_NOT_INSTALLED) where the packages that serve are not installed."""
    missing = [name for name in ("gradwire_server", "ray", "zmq", "pydantic_settings") if not _installed(name)]
    if missing:
        raise FailedPrecondition(
            f"This installation can only connect; to serve it also needs {', '.join(missing)}: "
            "pip install 'gradwire[server]'",
            reason="SERVER_NOT_INSTALLED",
        )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _flag(name: str, value: Any) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InvalidArgument(f"no such setting: {name!r}", reason="SERVER_OPTION_INVALID", field="server_options")
    return f"--{name.replace('_', '-')}={value}"
