"""The supervisor with a real Ray, and a stand-in that listens where the frontend would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import alive

STAND_IN = Path(__file__).with_name("stand_in_frontend.py")


class Service:
    """A supervisor in a process of its own, and what can be seen of it from outside."""

    def __init__(self, folder: Path, *flags: str, ranks: int = 0) -> None:
        self._trace = folder / "trace"
        code = (
            "import sys; from gradwire_server.supervisor import main; "
            f"sys.exit(main(sys.argv[1:], frontend=[sys.executable, {str(STAND_IN)!r}]))"
        )
        self.errors = folder / "errors"
        self.folders: list[Path] = []
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "--listen=127.0.0.1:0", "--workers=2", "--drain-seconds=5", *flags],
                env=os.environ | {"STAND_IN_TRACE": str(self._trace), "STAND_IN_RANKS": str(ranks)},
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.tree: dict[int, psutil.Process] = {}

    def address(self) -> tuple[str, int]:
        """Where the service says it listens."""
        assert self.process.stdout
        line = self.process.stdout.readline().decode()
        assert line.startswith("gradwire listening on "), (line, self.errors.read_text())
        host, _, port = line.split()[-1].rpartition(":")
        self.processes()
        (frontend,) = self.named("--runtime-dir=")
        flags = {name: value for name, _, value in (flag.partition("=") for flag in frontend.cmdline())}
        self.folders = [Path(flags["--runtime-dir"]).parent, Path(flags["--shared-memory-dir"])]
        assert all(folder.is_dir() and folder.stat().st_mode & 0o077 == 0 for folder in self.folders)
        self.where = host, int(port)
        return self.where

    def trace(self, what: str) -> list[int]:
        """The processes that have left this trace."""
        lines = [line.partition(" ") for line in self._trace.read_text().splitlines()] if self._trace.exists() else []
        return [int(pid) for pid, _, did in lines if did == what]

    def ranks(self) -> list[int]:
        """The processes of the actors that the stand-in which runs now has made in Ray."""
        lines = [line.split() for line in self._trace.read_text().splitlines()]
        return [int(line[2]) for line in lines if line[1] == "rank" and line[0] == lines[-1][0]]

    def processes(self) -> dict[int, psutil.Process]:
        """Every process of the service that was seen since the start."""
        root = psutil.Process(self.process.pid)
        self.tree |= {process.pid: process for process in [root, *root.children(recursive=True)]}
        return self.tree

    def named(self, part: str) -> list[psutil.Process]:
        """The processes that run now and have `part` in their command line."""
        return [process for process in self.processes().values() if alive(process) and part in command(process)]

    def assert_nothing_is_left(self, within: float = 10.0) -> None:
        eventually(lambda: not [process for process in self.tree.values() if alive(process)], within)
        eventually(lambda: not any(folder.exists() for folder in self.folders), within)


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def eventually(condition: Callable[[], object], within: float) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not so within {within} s"
        time.sleep(0.05)


def stop(service: Service) -> None:
    service.process.terminate()
    service.process.terminate()
    service.process.wait(30)
    service.assert_nothing_is_left()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start_one(*flags: str, ranks: int = 0) -> Service:
        services.append(Service(tmp_path, *flags, ranks=ranks))
        return services[-1]

    yield start_one
    for service in services:
        stop(service)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with two ranks which outlives what tests kill of it. They share it: Ray takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        # What the caller's own Ray cluster and other services have left in the environment must not reach this one.
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        patch.setenv("RAY_AUTH_TOKEN", "not-this-one")
        patch.setenv("GRADWIRE_WORKERS", "5")
        service = Service(tmp_path_factory.mktemp("s"), ranks=2)
    try:
        service.address()
        yield service
    finally:
        stop(service)


def test_ray_keeps_to_loopback_and_to_the_services_own_settings(running: Service) -> None:
    assert "--num-cpus=2" in command(running.named("ray.scripts.scripts")[0])
    listening = [
        connection.laddr.ip
        for process in running.processes().values()
        if alive(process)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_ranks_are_forks_of_one_process_that_outlives_them(running: Service) -> None:
    (template,) = {psutil.Process(pid).ppid() for pid in running.ranks()}
    (named,) = running.named("gradwire_workers.pool.template")
    assert named.pid == template
    (ray,) = running.named("ray.scripts.scripts")
    assert named.ppid() == ray.ppid(), "it imports torch while Ray starts"
    assert any("libtorch" in file.path for file in named.memory_maps())
    killed, other = (psutil.Process(pid) for pid in running.ranks())
    killed.kill()
    eventually(lambda: not alive(killed), within=5)
    time.sleep(1)  # Ray ends the process group of a worker that is gone, and gives it a moment first
    assert alive(other) and alive(named), "the end of a rank is its own"


def test_a_killed_raylet_brings_a_new_ray_and_a_new_frontend_on_the_same_port(running: Service) -> None:
    ready = len(running.trace("ready"))
    (raylet,) = running.named("raylet/raylet")
    (template,) = running.named("gradwire_workers.pool.template")
    ranks = [running.tree[pid] for pid in running.ranks()]
    assert len(ranks) == 2
    (ray,) = running.named("ray.scripts.scripts")
    ray.suspend()  # it looks once a second only whether its parts are there
    raylet.kill()
    eventually(lambda: not alive(template), within=5)
    eventually(lambda: len(running.trace("ready")) == ready + 1, within=60)
    with socket.create_connection(running.where, timeout=2):
        pass
    (new_raylet,) = running.named("raylet/raylet")
    assert new_raylet.pid != raylet.pid
    assert not [process for process in ranks if alive(process)]
    # What it keeps outlives both, although nobody has named a storage.
    assert running.trace("journal-2")


def test_a_killed_frontend_is_started_again_on_the_same_port_with_the_same_ray(running: Service) -> None:
    ready = running.trace("ready")
    (raylet,) = running.named("raylet/raylet")
    os.kill(ready[-1], signal.SIGKILL)
    eventually(lambda: len(running.trace("ready")) == len(ready) + 1, within=30)
    eventually(lambda: socket.create_connection(running.where, timeout=2).close() is None, within=2)
    assert [process.pid for process in running.named("raylet/raylet")] == [raylet.pid]


def test_sigterm_drains_and_leaves_nothing_behind(running: Service) -> None:
    """The last of those that share the service: it ends it."""
    assert len(running.ranks()) == 2 and set(running.ranks()) < set(running.tree)
    running.process.terminate()
    assert running.process.wait(30) == 0
    assert running.trace("drained") == running.trace("ready")[-1:]
    running.assert_nothing_is_left(within=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["guard", "supervisor"])
def test_nothing_survives_a_killed(start: Callable[..., Service], victim: str) -> None:
    service = start(ranks=2)
    service.address()
    guard = psutil.Process(service.process.pid)
    (supervisor,) = [child for child in guard.children() if "supervisor" in command(child)]
    {"guard": guard, "supervisor": supervisor}[victim].kill()
    service.assert_nothing_is_left(within=10)


def test_settings_that_are_wrong_are_exit_code_2_and_name_the_setting(start: Callable[..., Service]) -> None:
    service = start("--workers=0")
    assert service.process.wait(30) == 2
    assert "workers" in service.errors.read_text()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "example.com:50051"])
def test_listening_to_the_network_is_refused_unless_asked_for_in_words(
    start: Callable[..., Service], listen: str
) -> None:
    service = start(f"--listen={listen}")
    assert service.process.wait(30) == 2
    assert "--insecure-listen-anywhere" in service.errors.read_text()


def test_a_port_in_use_ends_the_service_with_the_frontends_reason(start: Callable[..., Service]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        service = start(f"--listen=127.0.0.1:{other.getsockname()[1]}")
        assert service.process.wait(60) == 1
    assert "Address already in use" in service.errors.read_text()
