"""A private Ray on this machine: one node, loopback only, token authentication, nothing that the service does not use.

It is `ray start --head --block` with what its flags cannot say in a start hook and in the environment. Measured on two
cores: 2.0 s until a driver can join, where the untrimmed command takes 4.5 to 5.7 s and starts four processes more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADDRESS_FILE_VARIABLE = "GRADWIRE_RAY_ADDRESS_FILE"
"""Names the file in which the frontend finds Ray's address, once Ray is ready."""

RAY_PARTS = ("raylet", "gcs_server")
"""The processes of `ray start` without which there is no Ray."""

# The program that Ray starts for each worker, and the variable by which it finds the process to fork.
_WORKER = "gradwire_workers.pool.forked_worker"
_TEMPLATE_VARIABLE = "GRADWIRE_TEMPLATE"

_OBJECT_STORE_BYTES = 80_000_000  # Ray's least, nearly: tensors do not pass through the object store.
_NO_PORT = 65536

# What the caller's own Ray cluster may have left in the environment; it must not reach ours.
_FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_REDIS_ADDRESS", "RAY_TMPDIR")


def ray_command(folder: Path, *, cpus: int) -> list[str]:
    """The command that runs Ray in the foreground, with its session below `folder`."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        f"--temp-dir={folder}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--port=0",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--no-monitor",
        "--disable-usage-stats",
    ]


def ray_environment(environment: Mapping[str, str], token_file: Path, template: Path) -> dict[str, str]:
    """`environment` for Ray itself and for the drivers that join it. `template`: the socket by which workers start."""
    return {name: value for name, value in environment.items() if name not in _FOREIGN_VARIABLES} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's switch for one-machine clusters, which are the rule on other systems. Without it `ray start` replaces
        # 127.0.0.1 by the machine's address, and Ray listens to the whole network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_START_HOOK": f"{__name__}.trim",
        _TEMPLATE_VARIABLE: str(template),
        # Ray would start idle workers on its own, which compete for the cores with the warm pool's ranks.
        "RAY_enable_worker_prestart": "false",
        "RAY_prestart_worker_first_driver": "false",
        # Ray's workers yield the processor to everybody else; ranks are what this service is for.
        "RAY_worker_niceness": "0",
    }


def write_token(file: Path) -> None:
    """Make the secret that Ray's processes and drivers share."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))


def trim(parameters: Any, head: bool) -> None:
    """Ray's start hook, for what `ray start` has no flags: how workers start, and what is left out.

    The Ray client server would take the fixed port 10001; the API server takes two seconds and serves the dashboard
    only. Ray goes on without it when it cannot have its port, so it is given one that nobody can have.
    """
    parameters.ray_client_server_port = None
    parameters.dashboard_port = _NO_PORT
    worker = importlib.util.find_spec(_WORKER)
    assert worker is not None and worker.origin is not None
    parameters.worker_path = worker.origin


def address_file(folder: Path) -> Path:
    """The file that `ray start` writes last: Ray's address, when a driver can join."""
    return folder / "ray_current_cluster"


def read_address(file: Path) -> str | None:
    """The address in an address file; None as long as Ray is not ready."""
    try:
        address = file.read_text().strip()
    except FileNotFoundError:
        return None
    return address if re.fullmatch(r"[^\s:]+:\d+", address) else None


def wait_for_address(file: Path, *, timeout: float = 60.0) -> str:
    """HOST:PORT of the Ray that writes `file` when it is ready. Raises TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (address := read_address(file)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray was not ready within {timeout:.0f} s; its log is beside {file}")
        time.sleep(0.02)
    return address
