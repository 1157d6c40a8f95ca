"""The embedded service: with a real Ray and the real frontend, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from processes import alive
from torch import nn

import gradwire
from gradwire import optim


def eventually(condition: Callable[[], object], within: float) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not so within {within} s"
        time.sleep(0.05)


def folders_of(processes: list[psutil.Process]) -> list[Path]:
    """The service's private folders, as the frontend was told them."""
    flags = [flag.partition("=") for process in processes for flag in process.cmdline()]
    return [Path(value) for name, _, value in flags if name in ("--runtime-dir", "--shared-memory-dir")]


def wait_for_ranks(root: psutil.Process, count: int) -> list[psutil.Process]:
    """The whole tree, once `count` warm ranks are in it."""

    def ranks() -> list[psutil.Process]:
        return [process for process in root.children(recursive=True) if "RankActor" in " ".join(process.cmdline())]

    eventually(lambda: len(ranks()) >= count, within=60)
    return [root, *root.children(recursive=True)]


@pytest.mark.slow
def test_a_client_killed_with_sigkill_takes_its_service_with_it_within_ten_seconds(tmp_path: Path) -> None:
    # launch() in a thread that ends: the service belongs to the process, so it must outlive the thread.
    program = """
        import threading, time, gradwire
        clients = []
        thread = threading.Thread(target=lambda: clients.append(gradwire.launch(workers=2)))
        thread.start()
        thread.join()
        time.sleep(1)
        clients[0].server_info()
        print("launched", flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as client:
        try:
            assert client.stdout
            assert client.stdout.readline() == b"launched\n"
            tree = wait_for_ranks(psutil.Process(client.pid).children()[0], 2)
            folders = folders_of(tree)
            assert len(tree) >= 9
            assert len(folders) == 2
            assert all(folder.exists() for folder in folders)
        finally:
            client.kill()
        eventually(lambda: not any(map(alive, tree)) and not any(folder.exists() for folder in folders), within=10)


def test_closing_the_client_ends_the_service_and_a_new_one_on_the_storage_that_was_named_serves_the_same_models(
    tmp_path: Path,
) -> None:
    storage, x, y = tmp_path / "kept", torch.randn(6, 3), torch.randn(6, 1)
    with gradwire.launch(workers=1, storage=storage, spare_ranks=1, log_level="info", timeout=30.0) as client:
        assert client._rpc.timeout == 30.0
        (guard,) = [child for child in psutil.Process().children() if f"--storage={storage}" in child.cmdline()]
        tree = [guard, *guard.children(recursive=True)]
        folders = folders_of(tree)
        assert client.server_info().workers == 1
        model = client.create_model(
            nn.Linear(3, 1), loss=nn.MSELoss(), optimizer=optim.Adam(lr=0.01), example=(x, y), model_id="kept"
        )
        losses = [model.train_step(x, y).loss for _ in range(4)]
        weights = model.state_dict()
    assert not any(map(alive, tree))
    assert not any(folder.exists() for folder in folders)
    assert {path.name for path in storage.iterdir()} >= {"format", "logs", "models"}
    assert "stopping: SIGTERM" in (storage / "logs" / "frontend.log").read_text()
    assert (storage / "logs" / "ray.log").stat().st_size > 0
    assert list(storage.glob("logs/session_2*/raylet.out"))
    client.close()
    with gradwire.launch(workers=1, storage=storage, spare_ranks=1) as client:
        model = client.get_model("kept")
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        result = model.train_step(x, y)
        assert result.step == 5 and result.loss < losses[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"spare_ranks": -1}, "spare_ranks"),
        ({"no_such_setting": 1}, "no-such-setting"),
        ({"listen": "0.0.0.0:0"}, "--insecure-listen-anywhere"),
        ({"storage": "/dev/null/not-a-folder"}, "storage"),
    ],
)
def test_wrong_options_are_named_and_leave_nothing_running(options: dict, named: str) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(gradwire.errors.InvalidArgument, match=named):
        gradwire.launch(**options)
    assert set(psutil.Process().children()) == before


def test_a_service_that_is_not_ready_in_time_is_unavailable_and_leaves_nothing_running() -> None:
    before = set(psutil.Process().children())
    begin = time.monotonic()
    with pytest.raises(gradwire.errors.Unavailable, match=r"not ready within 1 s") as caught:
        gradwire.launch(start_timeout=1.0)
    assert caught.value.reason == "LAUNCH_FAILED"
    assert time.monotonic() - begin < 12
    assert set(psutil.Process().children()) == before


def test_without_the_server_extra_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['ray'] = None; import gradwire; gradwire.launch()"
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 1
    assert "FailedPrecondition" in outcome.stderr
    assert "pip install 'gradwire[server]'" in outcome.stderr
