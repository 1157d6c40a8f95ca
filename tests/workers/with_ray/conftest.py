"""A real Ray, and a cluster of ranks on it, for the tests of this folder."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from ray._private import ray_constants
from ray._private.authentication_test_utils import reset_auth_token_state

from gradwire_workers.cluster import Cluster, ClusterConfig


@pytest.fixture(scope="session")
def private_folder() -> Iterator[Path]:
    """A folder with a short path: Unix sockets live in it."""
    folder = Path(tempfile.mkdtemp(prefix="gw-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def memory_folder() -> Iterator[Path]:
    """A folder in shared memory."""
    folder = Path(tempfile.mkdtemp(prefix="gradwire-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def ray_address(private_folder: Path) -> Iterator[str]:
    """The address of a Ray that ends with the run. Its token is in this process's environment meanwhile."""
    token = private_folder / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Makes Ray keep to the loopback interface.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray read its environment when it was imported. A frontend finds it set before.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        reset_auth_token_state()
        head = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("ray_head.py"), private_folder / "r", "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert head.stdout is not None
        yield head.stdout.readline().strip()
        head.communicate(timeout=30)


@pytest.fixture(scope="session")
def cluster_config(ray_address: str, private_folder: Path, memory_folder: Path) -> ClusterConfig:
    """Four ranks for models, two of them kept warm."""
    return ClusterConfig(
        address=ray_address,
        namespace="gradwire-test",
        folder=str(private_folder / "f"),
        memory_folder=str(memory_folder),
        workers=4,
        spare_ranks=2,
        threads_per_rank=1,
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(cluster_config: ClusterConfig) -> AsyncIterator[Cluster]:
    """The cluster that all tests share."""
    cluster = await Cluster.connect(cluster_config)
    await cluster.warm()
    yield cluster
    await cluster.close()
