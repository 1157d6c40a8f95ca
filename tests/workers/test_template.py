"""Ray's workers are forks of a template that has torch imported. Without Ray: a program tells of itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import json, os, sys, threading
had_torch = "torch" in sys.modules
import torch
a = torch.ones(3, requires_grad=True)
threading.Thread(target=lambda: (a * a).sum().backward()).start()
while a.grad is None:
    pass
json.dump({
    "arguments": sys.argv, "colour": os.environ.get("COLOUR"), "folder": os.getcwd(), "had_torch": had_torch,
    "main": __name__, "parent": os.getppid(), "path": sys.path[0], "had_ray": "ray" in sys.modules,
    "gradient": a.grad.tolist(), "oom_score": open("/proc/self/oom_score_adj").read().strip(),
}, sys.stdout)
print("and this is an error", file=sys.stderr)
"""
LAUNCH = "import sys; from gradwire_workers.pool.forked_worker import main; main(sys.argv[1], sys.argv[2:])"


@pytest.fixture
def ray_process() -> Iterator[subprocess.Popen]:
    """A process that starts workers, as Ray's does, one for each line that it reads."""
    code = f"""
import subprocess, sys, json
for line in sys.stdin:
    command, options = json.loads(line)
    subprocess.Popen([sys.executable, "-c", {LAUNCH!r}, *command], stdin=subprocess.DEVNULL, **{{
        name: open(value, "w") if name in ("stdout", "stderr") else value for name, value in options.items()
    }})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    assert process.stdin
    process.stdin.close()


@pytest.fixture
def socket_file(tmp_path: Path) -> Path:
    return tmp_path / "template.sock"


@pytest.fixture
def run(ray_process: subprocess.Popen, socket_file: Path, tmp_path: Path) -> Callable[..., dict]:
    """Runs the program as a worker of that process; what it says of itself."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(*arguments: str, template: Path = socket_file, **options: object) -> dict:
        out = tmp_path / f"out-{time.monotonic_ns()}"
        environment = os.environ | {"GRADWIRE_TEMPLATE": str(template), "COLOUR": "blue"}
        files = {"stdout": str(out), "stderr": f"{out}.errors"}
        command = [str(program), *arguments]
        assert ray_process.stdin
        ray_process.stdin.write(json.dumps([command, {"env": environment, **files, **options}]) + "\n")
        ray_process.stdin.flush()
        errors = Path(files["stderr"])
        deadline = time.monotonic() + 60
        while not (errors.exists() and "and this is an error" in errors.read_text()):
            assert time.monotonic() < deadline, errors.read_text()
            time.sleep(0.01)
        return json.loads(out.read_text()) | {"program": str(program), "errors": errors.read_text()}

    return run


def gone(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_worker_is_what_it_was_started_as_and_has_torch_already(run, tmp_path: Path) -> None:
    told = run("--one=1", "two words", cwd=str(tmp_path))
    assert told["arguments"] == [told["program"], "--one=1", "two words"]
    assert told["colour"] == "blue"
    assert told["folder"] == str(tmp_path)
    assert told["path"] == str(tmp_path)
    assert told["main"] == "__main__"
    assert told["had_torch"]
    assert not told["had_ray"], "Ray keeps what it read from the environment when it was imported"
    assert told["gradient"] == [2.0, 2.0, 2.0]
    assert told["oom_score"] == Path("/proc/self/oom_score_adj").read_text().strip()


def test_workers_that_start_at_once_are_forks_of_one_template_and_differ_in_what_they_are(run) -> None:
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(run, "abcd"))
    assert [worker["arguments"][1] for worker in told] == list("abcd")
    assert len({worker["parent"] for worker in told}) == 1


def test_a_killed_template_is_replaced_when_the_next_worker_starts(run) -> None:
    first = run()["parent"]
    os.kill(first, signal.SIGKILL)
    assert gone(first, within=5)
    told = run()
    assert told["parent"] != first
    assert told["had_torch"]


def test_the_template_ends_with_the_process_that_started_its_workers(run, ray_process, socket_file: Path) -> None:
    template = run()["parent"]
    assert psutil.Process(template).cmdline()[1:4] == ["-P", "-m", "gradwire_workers.pool.template"]
    ray_process.kill()
    assert gone(template, within=5)


def test_where_no_template_can_be_had_the_worker_runs_all_the_same(run, ray_process, tmp_path: Path) -> None:
    told = run("one", template=tmp_path / "no such folder" / "template.sock")
    assert told["arguments"] == [told["program"], "one"]
    assert told["parent"] == ray_process.pid
    assert not told["had_torch"]
    assert "No such file or directory" in told["errors"]


def test_one_who_asks_and_goes_away_does_not_keep_others_from_their_workers(run, socket_file: Path) -> None:
    template = run()["parent"]
    for nonsense in (b"", b"\xff\xff\xff\x7f", b"\x02\x00\x00\x00{}"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_file))
            connection.sendall(nonsense)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(socket_file))
        assert run()["parent"] == template
