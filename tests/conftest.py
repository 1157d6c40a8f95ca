"""What tests of every folder share: one embedded service for the whole run, and a client of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import gradwire


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files that mostly wait among those that compute: with two at once, one of each keeps both cores busy.

    xdist by itself would leave them, which have few tests, for the end.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = {path for path, its in files.items() if any(each.get_closest_marker("slow") for each in its)}
    computing = [path for path in files if path not in waiting]
    ordered: list[Path] = []
    for index, path in enumerate(each for each in files if each in waiting):
        first, last = (len(computing) * each // len(waiting) for each in (index, index + 1))
        ordered += [path, *computing[first:last]]
    if waiting:
        items[:] = [item for path in ordered for item in files[path]]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The machine's cores belong to the ranks; references here are small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and what they start inherits it: tests of Ctrl-C need it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def open_files() -> Callable[[], int]:
    """How many files this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it lie the weights that the service may read."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def client(weights_folder: Path) -> Iterator[gradwire.Client]:
    """A client of an embedded service for eight ranks, which ends with the run."""
    with gradwire.launch(workers=8, weights_folder=weights_folder) as client:
        yield client


@pytest.fixture(scope="session")
def service(client: gradwire.Client) -> str:
    """Where that service listens, `127.0.0.1:PORT`, for clients of a test's own."""
    return client.target


@pytest.fixture(autouse=True)
def models_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deletes the models that a test leaves behind; those of module-wide fixtures stay."""
    if "client" not in request.fixturenames:
        yield
        return
    client: gradwire.Client = request.getfixturevalue("client")
    before = {model.id for model in client.list_models()}
    yield
    for model in client.list_models():
        if model.id not in before:
            client.get_model(model.id).delete()


@pytest.fixture(scope="session")
def service_processes(client: gradwire.Client) -> Callable[..., set[int]]:
    """A function that gives the ids of the service's processes; `settled=True` waits until they stay the same."""

    def now() -> set[int]:
        return {process.pid for process in psutil.Process().children(recursive=True)}

    def settled_or_not(*, settled: bool = False, within: float = 30.0) -> set[int]:
        pids, since, deadline = now(), time.monotonic(), time.monotonic() + within
        # The warm pool refills itself in a few seconds: long enough without a change means that it is full.
        while settled and time.monotonic() - since < 2.5:
            assert time.monotonic() < deadline, f"processes still come and go after {within} s"
            time.sleep(0.25)
            if (found := now()) != pids:
                pids, since = found, time.monotonic()
        return pids

    return settled_or_not


@pytest.fixture(scope="session")
def frontend_pid(service_processes: Callable[..., set[int]]) -> int:
    """The process id of the frontend: `gradwire_server.main`, or the module that waits for Ray before it."""
    commands = {pid: psutil.Process(pid).cmdline() for pid in service_processes()}
    (pid,) = [pid for pid, words in commands.items() if any(word.startswith("gradwire_server.main") for word in words)]
    return pid
