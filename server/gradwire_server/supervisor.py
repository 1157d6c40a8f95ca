"""Keeps a private Ray and one frontend alive: `python -m gradwire_server.supervisor [settings] [--owner-pid PID]`.

Prints `gradwire listening on HOST:PORT` when the service first takes calls. A frontend that dies afterwards is started
again on the same port; when Ray dies, both are. SIGTERM drains. Exit codes: 0 drained, 2 wrong settings, 1 otherwise.
With --ray-address it becomes the frontend alone: whoever runs that Ray can restart a frontend too.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from gradwire_server.config import ConfigError, ServerConfig, add_flags, config_from_flags
from gradwire_server.doors.exposure import check_exposure
from gradwire_server.processes.process_tree import MARKER, ends_with_parent, kill_members, named_children
from gradwire_server.processes.rank_template import start_template
from gradwire_server.processes.ray_head import (
    ADDRESS_FILE_VARIABLE,
    RAY_PARTS,
    address_file,
    ray_command,
    ray_environment,
    write_token,
)
from gradwire_server.processes.restart_delay import RestartDelay
from gradwire_server.processes.service_folders import ServiceFolders, log_folder
from gradwire_server.processes.service_guard import guard

FRONTEND = (sys.executable, "-m", "gradwire_server.main_when_ray_is_ready")

_LISTENING = re.compile(rb"gradwire listening on (\S+)")
_GRACE_MARGIN = 5.0  # seconds beyond its grace until a frontend that does not end is killed


def main(arguments: Sequence[str] | None = None, *, frontend: Sequence[str] = FRONTEND) -> int:
    """Run a service until it is stopped or its owner is gone; the exit code. `frontend`: the command that serves."""
    parser = argparse.ArgumentParser(prog="python -m gradwire_server.supervisor", allow_abbrev=False)
    parser.description = "A gradwire service with a Ray of its own, or a frontend for the Ray at --ray-address."
    parser.add_argument("--owner-pid", type=int, help="the parent process; the service ends at once when it is gone")
    add_flags(parser)
    flags = parser.parse_args(arguments)
    try:
        config = config_from_flags(flags)
        check_exposure(config)
        if config.storage:
            log_folder(config.storage)
    except ConfigError as error:
        _say(str(error))
        return 2
    if config.ray_address:
        os.execve(
            sys.executable, [sys.executable, "-m", "gradwire_server.main", *config.flags()], _without_settings(config)
        )
    service = secrets.token_hex(4)
    return guard(
        service,
        config.storage,
        flags.owner_pid,
        lambda folders: Supervisor(config, service, folders, frontend).run(),
    )


class Supervisor:
    """One service's two children, and when to start them again. Runs in a process of its own."""

    def __init__(
        self, config: ServerConfig, service: str, folders: ServiceFolders, frontend_command: Sequence[str]
    ) -> None:
        self._config = config.model_copy(
            update={
                "runtime_dir": folders.frontend,
                "shared_memory_dir": folders.shared_memory,
                "storage": folders.storage,
                # A temporary storage goes with the service.
                "checkpoint_at_stop": config.checkpoint_at_stop and config.storage is not None,
            }
        )
        self._is_temporary = config.storage is None
        self._service = service
        self._folders = folders
        self._frontend_command = frontend_command
        self._listening_on: str | None = None
        token = folders.runtime / "ray-token"
        write_token(token)
        self._environment = ray_environment(_without_settings(config), token, self._folders.template) | {
            MARKER: service,
            ADDRESS_FILE_VARIABLE: str(address_file(folders.ray)),
        }
        self._ray: subprocess.Popen[bytes] | None = None
        self._frontend: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Serve until SIGTERM; the exit code."""
        stopped = _stop_descriptor()
        delay = RestartDelay()
        while True:
            if self._ray is None:
                self._start_ray()
            if self._frontend is None:
                self._start_frontend()
            code = self._wait_for_a_death(stopped)
            if code is None:
                return self._drain()
            if self._listening_on is None:
                # It never served: trying again would hide why. Wrong settings and a port in use end here.
                return code
            pause = delay.after_death()
            _say(f"starting again in {pause:.1f} s")
            if select.select([stopped], [], [], pause)[0]:
                return self._drain()

    def _start_ray(self) -> None:
        with open(self._folders.ray_log, "ab") as log:
            self._ray = subprocess.Popen(
                ray_command(self._folders.ray, cpus=self._config.workers),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=ends_with_parent(),
            )
            start_template(self._folders.template, self._ray.pid, self._environment, log)

    def _start_frontend(self) -> None:
        listen = self._listening_on or self._config.listen
        self._frontend = subprocess.Popen(
            [*self._frontend_command, *self._config.model_copy(update={"listen": listen}).flags()],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=ends_with_parent(),
        )

    def _wait_for_a_death(self, stopped: int) -> int | None:
        """Wait until a child dies and clear up after it; its exit code, or None when a stop was asked for."""
        assert self._ray and self._frontend and self._frontend.stdout
        output = self._frontend.stdout.fileno()
        ray_ends, frontend_ends = os.pidfd_open(self._ray.pid), os.pidfd_open(self._frontend.pid)
        waiting = select.poll()
        for descriptor in (stopped, output, ray_ends, frontend_ends):
            waiting.register(descriptor, select.POLLIN)
        unread, ray_parts = b"", []
        try:
            while True:
                events = {descriptor for descriptor, _ in waiting.poll()}
                if output in events:
                    data = os.read(output, 65536)
                    if not data:
                        waiting.unregister(output)
                    *lines, unread = (unread + data).split(b"\n")
                    for line in lines:
                        if self._pass_on(line) and not ray_parts:
                            ray_parts = _descriptors(named_children(self._ray.pid, RAY_PARTS))
                            for descriptor in ray_parts:
                                waiting.register(descriptor, select.POLLIN)
                if stopped in events:
                    return None
                # `ray start` looks only once a second whether its parts are there.
                if not events.isdisjoint((ray_ends, *ray_parts)):
                    return self._bury_ray()
                if frontend_ends in events:
                    code = self._frontend.wait()
                    _say(f"the frontend ended with exit code {code}")
                    self._close_frontend()
                    return code if code > 0 else 1
        finally:
            for descriptor in (ray_ends, frontend_ends, *ray_parts):
                os.close(descriptor)

    def _pass_on(self, line: bytes) -> bool:
        """Keep stdout for the one line that programs wait for; what else the frontend prints is log. Whether it was."""
        match = _LISTENING.match(line)
        stream = sys.stderr
        if match:
            stream = sys.stderr if self._listening_on else sys.stdout
            self._listening_on = match[1].decode()
        with suppress(BrokenPipeError):  # Whoever read it has seen enough.
            print(line.decode(errors="replace"), file=stream, flush=True)
        return match is not None

    def _bury_ray(self) -> int:
        """Ray is dead, and so are all ranks: end the frontend at once, and what Ray left behind.

        What it had acknowledged is in the storage; whoever waits for it hears of a lost connection, and asks again.
        """
        assert self._ray and self._frontend
        # Where a part of it ended, the rest goes too.
        self._ray.kill()
        _say(f"Ray ended with exit code {self._ray.wait()}; the end of its log:")
        _say(_tail(self._folders.ray_log))
        kill_members(self._service)
        self._close_frontend()
        self._ray = None
        self._folders.clear_for_restart()
        return 1

    def _drain(self) -> int:
        """Let the frontend finish what it has taken; the guard ends the rest."""
        if self._frontend is None:
            return 0
        self._frontend.terminate()
        try:
            code = self._frontend.wait(self._config.grace + _GRACE_MARGIN)
        except subprocess.TimeoutExpired:
            _say("the frontend did not end within its grace")
            return 1
        url = self._config.checkpoint_url
        if self._is_temporary and url is not None:
            # Here: a frontend that ends by itself is followed by another, which needs them.
            from gradwire_server.temporary_checkpoints import remove_automatic_checkpoints

            remove_automatic_checkpoints(self._folders.storage, url, _GRACE_MARGIN)
        return 0 if code in (0, -signal.SIGTERM) else 1

    def _close_frontend(self) -> None:
        assert self._frontend and self._frontend.stdout
        self._frontend.wait()
        self._frontend.stdout.close()
        self._frontend = None


def _without_settings(config: ServerConfig) -> dict[str, str]:
    """The environment without the service's settings: the frontend gets them as flags, and only so."""
    settings = {f"GRADWIRE_{name.upper()}" for name in type(config).model_fields} | {"GRADWIRE_CONFIG"}
    return {name: value for name, value in os.environ.items() if name.upper() not in settings}


def _descriptors(processes: Iterable[int]) -> list[int]:
    """One for each process: it becomes readable when that ends."""
    found = []
    for pid in processes:
        with suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found


def _stop_descriptor() -> int:
    """A descriptor that becomes readable, and stays so, when SIGTERM arrives."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: os.write(write, b"x"))
    return read


def _tail(file: os.PathLike[str], length: int = 2000) -> str:
    with open(file, "rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - length))
        return stream.read().decode(errors="replace").strip()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} supervisor: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
