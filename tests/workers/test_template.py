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
from processes import alive

from gradwire_workers.pool.handover import Handover

PROGRAM = """
import json, os, sys, threading
had_torch, gradient = "torch" in sys.modules, None
if had_torch:
    import torch
    a = torch.ones(3, requires_grad=True)
    threading.Thread(target=lambda: (a * a).sum().backward()).start()
    while a.grad is None:
        pass
    gradient = a.grad.tolist()
json.dump({
    "arguments": sys.argv, "path": sys.path[0], "colour": os.environ.get("COLOUR"), "folder": os.getcwd(),
    "main": __name__, "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0),
    "had_torch": had_torch, "had_ray": "ray" in sys.modules, "gradient": gradient,
    "oom_score": open("/proc/self/oom_score_adj").read().strip(),
}, sys.stdout)
print("and this is an error", file=sys.stderr)
"""
LAUNCH = "import os, sys; open('/proc/self/oom_score_adj', 'w').write(os.environ['SCORE']);"
LAUNCH += "from gradwire_workers.pool import forked_worker as it;"
LAUNCH += "it._PATIENCE_SECONDS = float(os.environ.get('PATIENCE', 25)); it.main(sys.argv[1], sys.argv[2:])"


def start_ray_process() -> subprocess.Popen:
    """A process that starts workers, as Ray's does, one for each line that it reads."""
    code = f"""
import subprocess, sys, json
for line in sys.stdin:
    command, options = json.loads(line)
    subprocess.Popen([sys.executable, "-c", {LAUNCH!r}, *command], stdin=subprocess.DEVNULL, **{{
        name: open(value, "w") if name in ("stdout", "stderr") else value for name, value in options.items()
    }})
"""
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    assert process.stdin
    process.stdin.close()


@pytest.fixture(scope="module")
def ray_process() -> Iterator[subprocess.Popen]:
    """The one whose workers all tests have, and so they share a template: that imports torch, which takes seconds."""
    process = start_ray_process()
    yield process
    end(process)


@pytest.fixture(scope="module")
def socket_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t") / "template.sock"


@pytest.fixture
def run(ray_process: subprocess.Popen, socket_file: Path, tmp_path: Path) -> Callable[..., dict]:
    """Runs the program as a worker of that process, or of another; what it says of itself."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(
        *arguments: str,
        process: subprocess.Popen = ray_process,
        template: Path = socket_file,
        environment: dict[str, str | None] | None = None,
        score: int | None = None,
        cwd: str | None = None,
    ) -> dict:
        out = tmp_path / f"out-{time.monotonic_ns()}"
        own = Path("/proc/self/oom_score_adj").read_text()
        variables = {"GRADWIRE_TEMPLATE": str(template), "COLOUR": "blue", "SCORE": str(score or own)}
        variables = os.environ | variables | (environment or {})
        given = {name: value for name, value in variables.items() if value is not None}
        files = {"stdout": str(out), "stderr": f"{out}.errors"}
        command = [str(program), *arguments]
        assert process.stdin
        process.stdin.write(json.dumps([command, {"env": given, "cwd": cwd, **files}]) + "\n")
        process.stdin.flush()
        errors = Path(files["stderr"])
        deadline = time.monotonic() + 60
        while not (errors.exists() and "and this is an error" in errors.read_text()):
            assert time.monotonic() < deadline, errors.read_text()
            time.sleep(0.01)
        return json.loads(out.read_text()) | {"program": str(program), "errors": errors.read_text()}

    return run


def eventually(condition: Callable[[], bool], within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def gone(pid: int, within: float) -> bool:
    return eventually(lambda: not alive(pid), within)


def test_a_worker_is_what_it_was_started_as_and_has_torch_already(run, tmp_path: Path) -> None:
    template = run("first")["parent"]
    # All of it differs from what the template, started by the first worker, has.
    (tmp_path / "elsewhere").mkdir()
    score = int(Path("/proc/self/oom_score_adj").read_text()) + 100
    told = run("--one=1", "two words", environment={"COLOUR": "red"}, cwd=str(tmp_path / "elsewhere"), score=score)
    assert told["parent"] == template
    assert told["arguments"] == [told["program"], "--one=1", "two words"]
    assert told["colour"] == "red"
    assert told["folder"] == str(tmp_path / "elsewhere")
    assert told["path"] == str(tmp_path)
    assert told["main"] == "__main__"
    assert told["had_torch"]
    assert not told["had_ray"], "Ray keeps what it read from the environment when it was imported"
    assert told["gradient"] == [2.0, 2.0, 2.0]
    assert told["oom_score"] == str(score)
    assert told["group"] == told["pid"], "Ray kills whole process groups"


def test_a_variable_that_a_worker_was_started_without_is_not_in_its_environment(run) -> None:
    run("first")
    assert run("second", environment={"COLOUR": None})["colour"] is None


@pytest.mark.slow
def test_a_killed_template_is_replaced_by_one_for_all_workers_that_start_next_at_once(run) -> None:
    first = run()["parent"]
    os.kill(first, signal.SIGKILL)
    assert gone(first, within=5)
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(run, "abcd"))
    assert [worker["arguments"][1] for worker in told] == list("abcd")
    assert all(worker["had_torch"] for worker in told)
    (template,) = {worker["parent"] for worker in told}
    assert template != first


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


def test_a_fork_that_nobody_waits_for_any_more_ends(run, socket_file: Path) -> None:
    template = psutil.Process(run()["parent"])
    descriptors = template.num_fds()
    handover = Handover.of_this_process("/no/such/program", [])
    # Asked while the template cannot answer, and gone when it can.
    template.suspend()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_file))
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                handover.send(connection)
    template.resume()
    assert run()["parent"] == template.pid
    assert eventually(lambda: not template.children())
    assert template.num_fds() == descriptors


def test_a_template_that_does_not_answer_is_replaced_and_costs_no_worker(run) -> None:
    template = psutil.Process(run()["parent"])
    template.suspend()
    late = run("late", environment={"PATIENCE": "1"})
    assert not late["had_torch"]
    assert "did not answer" in late["errors"]
    assert run("next")["parent"] not in (template.pid, late["parent"])
    template.resume()
    assert eventually(lambda: not template.children()), "what it forks late ends"


def test_the_template_ends_with_the_process_that_started_its_workers(run, ray_process) -> None:
    template = run()["parent"]
    assert psutil.Process(template).cmdline()[1:4] == ["-P", "-m", "gradwire_workers.pool.template"]
    # The file's last test: no worker comes after it, and another template would import torch for this alone.
    end(ray_process)
    assert gone(template, within=5)
