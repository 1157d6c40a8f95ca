"""The frontend as a process: what it says and returns when it cannot start."""

from __future__ import annotations

import subprocess
import sys

import pytest


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


def test_help_lists_every_setting() -> None:
    ended = run("--help")
    assert ended.returncode == 0 and "--held-seconds" in ended.stdout and "default: 127.0.0.1:50051" in ended.stdout
