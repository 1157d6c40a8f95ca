"""The frontend as a process: what it says and returns when it cannot start."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradwire_server.main", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models=0"], "models: should be greater than or equal to 1, got '0' (--models)"),
        (["--listen=127.0.0.1:0"], "ray_address: needed here; `gradwire serve` without it starts a Ray of its own"),
    ],
)
def test_wrong_setting_ends_with_one_line_and_status_2(flags: list[str], message: str) -> None:
    ended = run(*flags)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"gradwire: {message}\n")


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    """`gradwire serve`, as users type it."""
    command = [sys.executable, "-c", "import sys; from gradwire.cli import main; sys.exit(main())", "serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_keeps_a_service_from_starting_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no certificate")
    elsewhere = "--ray-address=127.0.0.1:1"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            (f"--storage={file}/models",): (2, f"storage: {file}/models cannot be written to (Not a directory:"),
            (elsewhere, f"--tls-certificate={file}", f"--tls-key={file}"): (1, "tls_certificate and tls_key: "),
            (elsewhere, f"--tokens={tmp_path}/none"): (1, f"{tmp_path}/none"),
            (elsewhere, f"--health-listen=127.0.0.1:{port}"): (1, f"cannot listen on 127.0.0.1:{port}: is it taken?"),
            (elsewhere,): (1, "ray_address: Ray does not answer at 127.0.0.1:1 (Connection refused); expected the"),
        }
        for flags, (code, words) in cases.items():
            ended = serve("--listen=127.0.0.1:0", *flags)
            # grpc has a word of its own to say about a port that is taken.
            lines = [line for line in ended.stderr.splitlines() if "gradwire: " in line or "supervisor: " in line]
            assert (ended.returncode, ended.stdout, len(lines)) == (code, "", 1), (flags, ended)
            assert words in lines[0], (flags, lines)


def test_a_service_that_waits_for_ray_lives_is_not_ready_and_ends_when_it_is_told_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as free:
        ray, port = silent.getsockname()[1], free.getsockname()[1]
        free.close()
        flags = ["--listen=127.0.0.1:0", f"--health-listen=127.0.0.1:{port}", f"--ray-address=127.0.0.1:{ray}"]
        command = [sys.executable, "-m", "gradwire_server.main", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            stub: Any = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
            serves = {
                name: stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30, wait_for_ready=True).status
                for name in ("live", "ready", "ray", "drain")
            }
            process.terminate()
            assert process.wait(10) == 0
    assert serves == {"live": 1, "ready": 2, "ray": 2, "drain": 1}


def test_help_lists_every_setting() -> None:
    ended = run("--help")
    assert ended.returncode == 0 and "--held-seconds" in ended.stdout and "default: 127.0.0.1:50051" in ended.stdout
